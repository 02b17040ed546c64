"""What starting costs: the package beside the imports of the stack that it stands on, in fresh interpreters.

    python -m scripts.benchmarks.start --csv docs/benchmarks/start.csv

Every kind is a Python of its own, run in turns; ms are medians of the whole process, ratios medians of the pairs with
the stack: what a run of a Llama by hand has to import (torch, transformers' Trainer and Llama, PEFT, datasets).
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import os
import subprocess
import sys
from functools import partial
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
    "import fedlora_hf": "import fedlora_hf",
    "fedlora --help": "import sys; sys.argv = ['fedlora', '--help']; from fedlora_hf.cli import main; main()",
    "fedlora train --help": (
        "import sys; sys.argv = ['fedlora', 'train', '--help']; from fedlora_hf.cli import main; main()"
    ),
}


def start(code: str) -> None:
    """A fresh interpreter that runs `code` and ends."""
    environment = {**os.environ, "PYTHONPATH": python_path()}
    subprocess.run([sys.executable, "-c", code], env=environment, check=False, capture_output=True)


def measured(repeats: int) -> list[dict[str, object]]:
    """A row a kind; each has been started once before, so that all files are in the system's cache."""
    kinds = {kind: partial(lambda code, _: start(code), code) for kind, code in KINDS.items()}
    for kind in kinds.values():
        kind("")
    rows = common.compared(common.in_turns(kinds, ["start"], repeats), STACK)
    return [{name: value for name, value in row.items() if name != "cpu_ratio"} for row in rows]


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
