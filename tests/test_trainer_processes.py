"""Two processes train different clients, and leave what one process leaves, to the bit."""
# SPDX-License-Identifier: Apache-2.0

import os
import subprocess
import sys
from pathlib import Path

import models
import pytest

SCRIPT = """
import sys
import models
import fedlora_hf.output
fedlora_hf.output.write_report = lambda record, folder: []
clients = models.token_clients({"ada": 4, "bob": 6, "eve": 5}, held_out=2)
trainer = models.federation(sys.argv[1], clients, evaluate_rounds=True, personal_steps=1)
trained = []
train_client = trainer.train_client
trainer.train_client = lambda client, number: trained.append(client) or train_client(client, number)
trainer.train()
assert trainer.accelerator.num_processes == 2
print(f"process {trainer.accelerator.process_index} trained {sorted(set(trained))}", flush=True)
"""


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path, bare_output: None) -> None:
    script = tmp_path / "federation.py"
    script.write_text(SCRIPT)
    project = Path(__file__).parents[1]
    path = os.pathsep.join([str(project), str(project / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path / "two")], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shares = sorted(line for line in done.stdout.splitlines() if line.startswith("process"))
    assert shares == ["process 0 trained ['ada', 'eve']", "process 1 trained ['bob']"]
    clients = models.token_clients({"ada": 4, "bob": 6, "eve": 5}, held_out=2)
    one = models.federation(tmp_path / "one", clients, evaluate_rounds=True, personal_steps=1)
    one.train()
    assert models.weight_files(tmp_path / "two") == models.weight_files(tmp_path / "one")
