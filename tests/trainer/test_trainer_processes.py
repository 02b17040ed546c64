"""Several processes train different clients, each the next one when it is free: one process's result, to the bit."""
# SPDX-License-Identifier: Apache-2.0

import ast
from pathlib import Path

import models
import pytest
from launched import launch

SIZES = {"ada": 4, "bob": 14, "cyd": 3, "dan": 9, "eve": 5}
OPTIONS = {"evaluate_rounds": True, "personal_steps": 1, "local_steps": None, "lora_dropout": 0.1}
OPTIONS |= {"aggregation": "clair", "functional_judges": 3}
SCRIPT = f"""
import os, sys, time
import models
import fedlora_hf.rounds.output
fedlora_hf.rounds.output.write_report = lambda record, folder: []
os.fsync = lambda handle: None
clients = models.token_clients({SIZES}, held_out=2)
trainer = models.federation(sys.argv[1], clients, **{OPTIONS})
trained = []
train_client = trainer.train_client

def noted(client, number):
    trained.append(f"{{client}} {{number}}")
    time.sleep(3 * (trainer.processes.number == 1))
    return train_client(client, number)

trainer.train_client = noted
trainer.train()
os.write(1, f"{{trainer.processes.number}} {{trained}}\\n".encode())
"""


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedlora_hf.rounds.output.write_report", lambda record, folder: [])
        models.federation(folder, models.token_clients(SIZES, held_out=2), **OPTIONS).train()
    return left(folder)


def left(folder: Path) -> dict[str, bytes]:
    """Every adapter of the run, and what its judges found."""
    notes = {f"functional {number}": folder / "rounds" / number / "functional.json" for number in ("1", "2")}
    return models.weight_files(folder) | {name: path.read_bytes() for name, path in notes.items()}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_as_many_processes_as_one_likes_are_one(processes: int, one_process: dict[str, bytes], tmp_path: Path) -> None:
    """Clients of 3 to 14 examples train a full epoch with dropout. Process 1 is slow, so the others do most of it."""
    printed = launch(SCRIPT, tmp_path, processes, tmp_path / "several")
    trained = {int(line[0]): ast.literal_eval(line[2:]) for line in printed}
    assert sorted(trained) == list(range(processes))
    everything = sorted(f"{client} {number}" for client in SIZES for number in (1, 2))
    assert sorted(client for part in trained.values() for client in part) == everything
    assert len(trained[1]) <= 2
    assert "bob 1" in {part[0] for part in trained.values() if part}  # the longest is among the first
    assert left(tmp_path / "several") == one_process
