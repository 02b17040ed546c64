"""Runs a script in several gloo processes of this machine, for the tests that need more than one."""
# SPDX-License-Identifier: Apache-2.0

import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[1]


def launch(script: str, folder: Path, processes: int, *arguments: object) -> list[str]:
    """The lines that the processes printed, sorted; the script's end on a failure. It can import from tests/."""
    path = folder / "script.py"
    path.write_text(script)
    paths = os.pathsep.join([str(PROJECT), str(PROJECT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(path), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return sorted(done.stdout.splitlines())
