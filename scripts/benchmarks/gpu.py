"""Everything that needs one GPU, in parts that are bounded and kept: eight minutes at most, and it can be called again.

    python -m scripts.benchmarks.gpu --csv docs/benchmarks/gpu.csv
    python -m scripts.benchmarks.gpu --parts client aggregation
    python -m scripts.benchmarks.gpu --tiny

Each part runs in a process of its own, is ended at twice the seconds it should take, and leaves its rows in `--cache`.
A part that is there already, of the same card, versions and sizes, is not run again; one that would not fit into what
is left of `--minutes` waits for the next call, which is said. The csv holds the parts that are done. `--tiny` runs the
same code on a CPU, in this process, and measures nothing worth keeping. What the parts do: `gpu_parts`, `gpu_lockstep`.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from scripts import common, python_path
from scripts.benchmarks import gpu_lockstep, gpu_parts


class Part(NamedTuple):
    """rows: (the sizes) -> rows of `gpu_parts.measured`. seconds: about how long on an H100, its imports included."""

    rows: Callable[[argparse.Namespace], list[dict[str, Any]]]
    seconds: int


PARTS: dict[str, Part] = {
    "client": Part(gpu_parts.client, 60),
    "scoring": Part(gpu_parts.scoring_of, 20),
    "aggregation": Part(gpu_parts.aggregation, 70),
    "robust_aggregation": Part(gpu_parts.robust_aggregation, 50),
    "lockstep": Part(gpu_lockstep.small, 40),
    "lockstep_7b": Part(gpu_lockstep.large, 55),
}
TINY = {"hidden": 32, "layers": 2, "heads": 2, "vocabulary": 64, "batch": 2, "tokens": 16, "steps": 2, "repeats": 2}
TINY |= {"rank": 4, "clients": 8}
SIZES = {"hidden": 4096, "layers": 32, "heads": 32, "vocabulary": 32000, "rank": 16, "batch": 4, "tokens": 512}
SIZES |= {"steps": 10, "repeats": 5, "clients": 50}


def kept(case: argparse.Namespace, name: str) -> Path:
    """Where a part's rows are kept."""
    return Path(case.cache) / f"{name}.json"


def stamp(case: argparse.Namespace) -> str:
    """What rows are comparable by: the machine, the versions and the sizes, without the date."""
    machine = common.environment(case.device).partition("; ")[2]
    return "; ".join([machine, *(f"{name} {getattr(case, name)}" for name in SIZES)])


def done(case: argparse.Namespace, name: str) -> dict[str, Any] | None:
    """A part's rows from an earlier call; None where there are none of this machine and these sizes."""
    try:
        found: dict[str, Any] = json.loads(kept(case, name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if found.get("stamp") == stamp(case) else None


def take(case: argparse.Namespace, name: str) -> None:
    """Run a part in this process and keep its rows."""
    content = {"stamp": stamp(case), "environment": common.environment(case.device), "rows": PARTS[name].rows(case)}
    path = kept(case, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".new").replace(path)


def bounded(command: Sequence[str], seconds: float) -> str:
    """Run a command for at most so long; "" when it ended well, else what happened, in a line."""
    environment = {**os.environ, "PYTHONPATH": python_path()}
    try:
        code = subprocess.run(command, env=environment, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:g} s"
    return f"failed with exit code {code}" if code else ""


def run(case: argparse.Namespace, names: Sequence[str]) -> dict[str, str]:
    """Take the parts that are not there yet, while the time lasts; {part: why it is not there}."""
    lacking: dict[str, str] = {}
    end = time.monotonic() + 60 * case.minutes
    for name in names:
        left, seconds = end - time.monotonic(), PARTS[name].seconds
        if done(case, name):
            continue
        if case.tiny:
            take(case, name)
        elif seconds > left:
            lacking[name] = f"needs about {seconds} s of {max(left, 0):.0f} left: call again"
        else:
            sizes = [word for size in SIZES for word in (f"--{size}", str(getattr(case, size)))]
            command = [sys.executable, "-m", "scripts.benchmarks.gpu", "--only", name, "--cache", str(case.cache)]
            if reason := bounded([*command, *sizes], round(min(2 * seconds, left))):
                lacking[name] = reason
    return lacking


def report(case: argparse.Namespace, names: Sequence[str], lacking: Mapping[str, str]) -> str:
    """Environment, sizes and table of what is done, and a line for each part that is not."""
    found = {name: content for name in names if (content := done(case, name))}
    rows = [{"part": name, **row} for name, content in found.items() for row in content["rows"]]
    lines = [f"{name}: **not measured**, {reason}" for name, reason in lacking.items()]
    if rows:
        shape = f"hidden {case.hidden}, {case.layers} layers, r={case.rank}, batch {case.batch} x {case.tokens} tokens"
        environments = dict.fromkeys(content["environment"] for content in found.values())
        lines = [f"{'; '.join(environments)}; {shape}", "", common.markdown(rows), "", *lines]
        if case.csv:
            common.write_csv(case.csv, rows)
    return "\n".join(lines).strip()


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--minutes", type=float, default=8.0, help="at most so long (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=Path("results_cache/gpu"), help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: shows that everything runs")
    parser.add_argument("--csv", type=Path, help="write the rows there as well")
    parser.add_argument("--markdown", type=Path, help="append the environment and the table to this file")
    parser.add_argument("--only", choices=list(PARTS), help=argparse.SUPPRESS)  # in a process of its own
    case = parser.parse_args(arguments)
    case.device = "cuda"
    if case.tiny:
        vars(case).update(TINY, device="cpu")
    elif not torch.cuda.is_available():
        parser.error("no CUDA device: run on a machine with one, or pass --tiny to see that everything runs")
    return case


def main(arguments: list[str] | None = None) -> int:
    """0 when all that was asked for is there, 1 when the next call has something left to do."""
    case = parse_arguments(arguments)
    logging.set_verbosity_error()
    if case.only:
        take(case, case.only)
        return 0
    lacking = run(case, case.parts)
    text = report(case, case.parts, lacking)
    print(text)
    if case.markdown:
        with case.markdown.open("a", encoding="utf-8") as handle:
            handle.write(f"\n{text}\n")
    return int(bool(lacking))


if __name__ == "__main__":
    raise SystemExit(main())
