"""What starting costs: the package beside the imports of the stack that it stands on, in fresh interpreters.

    python -m scripts.benchmarks.start --csv docs/benchmarks/start.csv

Every kind is a Python of its own, run in turns; times are medians of the whole process, ratios medians of the pairs
with the stack: what a run of a Llama by hand has to import (torch, transformers' Trainer and Llama, PEFT, datasets). On
a busy machine the processor's time and ratio are the ones to read.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from scripts import common, python_path

STACK = "the stack: torch, Trainer, Llama, PEFT, datasets"
KINDS = {
    "Python alone": "pass",
    STACK: "import datasets, peft, torch\nfrom transformers import LlamaForCausalLM, Trainer",
    "the stack and this package": (
        "import datasets, peft, torch\nfrom transformers import LlamaForCausalLM, Trainer\n"
        "from fedlora_hf import FederatedConfig, FederatedTrainer"
    ),
    "what fedlora train imports": "from fedlora_hf.cli import loaded; loaded('train', 'train')",
    "import fedlora_hf": "import fedlora_hf",
    "fedlora --help": "import sys; sys.argv = ['fedlora', '--help']; from fedlora_hf.cli import main; main()",
    "fedlora train --help": (
        "import sys; sys.argv = ['fedlora', 'train', '--help']; from fedlora_hf.cli import main; main()"
    ),
}


def start(code: str) -> common.Seconds:
    """Time of a fresh interpreter that runs `code` and ends, on the wall and on the processor."""
    environment = {**os.environ, "PYTHONPATH": python_path()}
    wall, cpu = time.perf_counter(), _children()
    subprocess.run([sys.executable, "-c", code], env=environment, check=False, capture_output=True)
    return common.Seconds(time.perf_counter() - wall, _children() - cpu)


def _children() -> float:
    """Processor seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measured(repeats: int) -> list[dict[str, object]]:
    """A row a kind, all started in turns in an order that turns."""
    times: dict[str, list[common.Seconds]] = {kind: [] for kind in KINDS}
    order = list(KINDS)
    for _ in range(repeats):
        for kind in order:
            times[kind].append(start(KINDS[kind]))
        order = order[1:] + order[:1]
    rows = common.compared(times, STACK)
    cpu = {kind: statistics.median(own.cpu for own in found) for kind, found in times.items()}
    return [{**row, "cpu_ms": round(1e3 * cpu[str(row["kind"])], 1)} for row in rows]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--csv", type=Path, help="write the rows there as well")
    args = parser.parse_args(arguments)
    rows = measured(args.repeats)
    print(f"{common.environment()}; {args.repeats} repeats\n\n{common.markdown(rows)}")
    if args.csv:
        common.write_csv(args.csv, rows)


if __name__ == "__main__":
    main()
