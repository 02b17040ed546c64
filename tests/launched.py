"""Runs a script in several gloo processes of this machine, and holds what they wrote against what one process wrote."""
# SPDX-License-Identifier: Apache-2.0

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

PROJECT = Path(__file__).parents[1]


def launch(script: str, folder: Path, processes: int, *arguments: object) -> list[str]:
    """The lines that the processes printed, sorted; the script's end on a failure. It can import from tests/."""
    path = folder / "script.py"
    path.write_text(script)
    tests = [PROJECT / "tests", PROJECT / "tests" / "launch", PROJECT / "tests" / "training"]
    paths = os.pathsep.join([str(PROJECT), *map(str, tests), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(path), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    # DeepSpeed, where it is installed, logs to the standard output as soon as a Trainer is made.
    return sorted(line for line in done.stdout.splitlines() if not line.startswith("[20"))


def assert_same_adapters(mine: Path, theirs: Path, atol: float) -> None:
    """Every adapter below one folder is below the other too, with the same tensors to `atol`."""
    files = sorted(path.relative_to(mine) for path in mine.rglob("*.safetensors"))
    assert files == sorted(path.relative_to(theirs) for path in theirs.rglob("*.safetensors"))
    for path in files:
        own, other = load_file(mine / path), load_file(theirs / path)
        assert own.keys() == other.keys()
        for key, tensor in own.items():
            torch.testing.assert_close(other[key], tensor, rtol=0, atol=atol)
