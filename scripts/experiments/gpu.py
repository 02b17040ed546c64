"""Everything on real bases that wants a GPU, as jobs: what is finished is not run again, what fits in --minutes is.

    python -m scripts.experiments.gpu --data DATA --base_7m base-7m --smollm2 smollm2 --list
    python -m scripts.experiments.gpu --data DATA --base_7m base-7m --smollm2 smollm2 --minutes 10

Jobs come in the order in which they advance the tables most; each adds its rows to the csv files of docs/results/real
(or --output_dir), and one that was cut off goes on after its last whole cell. Minutes are estimates for an H100: models
of this size are bound by the launches a step makes. They were not measured.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts import PROJECT
from scripts.experiments.real_methods import METHODS

DONE = "gpu_done.txt"
_LARGE = "--rounds 4 --steps 20 --batch 8 --max_length 256 --answers tasks mixtures dolly --new_tokens 32"
_RATES = "--rates 1e-4 3e-4 1e-3 3e-3 1e-2"
_SMOLLM2 = "--base {smollm2} --base_name smollm2-135m --model_dtype bfloat16"
_COMMON = "--data {data} --cache {cache} --output_dir {output_dir}"


@dataclass(frozen=True)
class Job:
    """command: the module and its flags, with {data}, {cache}, {output_dir}, {base_7m} and {smollm2} to be filled in.
    minutes: estimated."""

    name: str
    command: str
    minutes: float


def jobs() -> Iterator[Job]:
    """All of them, what is worth most first."""
    for source in ("tasks", "mixtures", "dolly"):
        for method in METHODS:
            name = shlex.quote(method)
            command = f"real_methods {_SMOLLM2} {_COMMON} --sources {source} --methods {name} {_LARGE} {_RATES}"
            yield Job(f"methods, smollm2, {source}, {method}", f"{command} --seeds 0 1 2", _minutes(method))
    for split in ("iid", "dirichlet", "tasks"):
        command = f"real_attacks {_SMOLLM2} {_COMMON} --splits {split} --seeds 0 1 2 --rate 1e-3 --clients 20 --bad 6"
        yield Job(f"attacks, smollm2, {split}", f"{command} --steps 20 --batch 8 --max_length 256 --examples 120", 6)
    for seed in (0, 1, 2):
        command = f"real_protocol {_SMOLLM2} {_COMMON} --seeds {seed} --rounds 100 --every 10 --batch 16"
        yield Job(f"FlowerTune, smollm2, seed {seed}", f"{command} --examples 700 --test 400 --peaks 5e-5 5e-4", 15)
    for name, base in (("smollm2", "{smollm2}"), ("base-7m", "{base_7m}")):
        command = f"sensitivity --model {base} --dolly {{data}}/dolly/databricks-dolly-15k.jsonl --iid --groups 4"
        command += " --categories closed_qa information_extraction open_qa general_qa --per_device_train_batch_size 8"
        command += " --max_length 256 --lora_r 8 --lora_alpha 16 --model_dtype bfloat16 --steps 10 40 160 --seeds 3"
        yield Job(
            f"sensitivity, {name}", f"{command} --cache {{cache}} --output_dir {{output_dir}}/sensitivity_{name}", 8
        )
    for source in ("tasks", "mixtures", "dolly"):
        command = f"real_methods --base {{base_7m}} --base_name base-7m-long {_COMMON} --sources {source} {_LARGE}"
        yield Job(f"methods, base-7m, {source}", f"{command} --model_dtype bfloat16 --seeds 0 1 2 3 4", 25)


def _minutes(method: str) -> float:
    """Five rates on one tuning seed and one or two on three others, of 6 clients x 80 steps, about 0.06 s each."""
    return 0.5 if method == "base" else 5.0


def main(given: Sequence[str] | None = None) -> int:
    """1 when a job failed; the others run all the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "base_7m", "smollm2"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("results_cache/gpu"))
    parser.add_argument("--output_dir", type=Path, default=PROJECT / "docs" / "results" / "real")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no job that would end after so many")
    parser.add_argument("--only", nargs="+", default=[""], help="jobs whose names begin so")
    parser.add_argument("--list", action="store_true", help="only say what would run")
    args = parser.parse_args(given)
    note = args.output_dir / DONE
    done = set(note.read_text(encoding="utf-8").splitlines()) if note.exists() else set()
    chosen = [job for job in jobs() if job.name.startswith(tuple(args.only))]
    to_do = [job for job in chosen if job.name not in done]
    for job in chosen:
        print(f"{'done' if job.name in done else f'{job.minutes:g} min':8} {job.name}")
    print(f"{len(to_do)} of {len(chosen)} jobs to do, about {sum(job.minutes for job in to_do):g} minutes")
    if args.list:
        return 0
    began, failed = time.monotonic(), []
    for job in to_do:
        if (time.monotonic() - began) / 60 + job.minutes > args.minutes:
            continue
        if run(job, args):
            failed.append(job.name)
            continue
        args.output_dir.mkdir(parents=True, exist_ok=True)
        with note.open("a", encoding="utf-8") as handle:
            handle.write(f"{job.name}\n")
    report = ["scripts.experiments.real_report", "--results", str(args.output_dir)]
    subprocess.run([sys.executable, "-m", *report], cwd=PROJECT, check=False)
    print(f"failed: {'; '.join(failed)}" if failed else "no job failed")
    return 1 if failed else 0


def run(job: Job, args: argparse.Namespace) -> int:
    """Its exit code."""
    places = {name: getattr(args, name).resolve() for name in ("data", "base_7m", "smollm2", "cache", "output_dir")}
    module, *flags = shlex.split(job.command.format(**places))
    print(f"== {job.name}", flush=True)
    return subprocess.run(
        [sys.executable, "-m", f"scripts.experiments.{module}", *flags], cwd=PROJECT, check=False
    ).returncode


if __name__ == "__main__":
    raise SystemExit(main())
