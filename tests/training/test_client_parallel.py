"""All processes train each client together: one process's result with so many times the accumulation, or one error."""
# SPDX-License-Identifier: Apache-2.0

import json
from pathlib import Path
from typing import Any

import models
import pytest
from launched import assert_same_adapters, launch

SIZES = {"ada": 5, "bob": 9, "eve": 2}
RUNS: dict[str, dict[str, Any]] = {
    "lora": {"personal_steps": 2, "fedprox_mu": 0.1},
    "dirmag": {"pipeline": "fedlora_optimizer", "personal_steps": 2, "local_steps": None},
    "stacking": {"aggregation": "stacking"},
    "judges": {"aggregation": "clair", "functional_judges": 1},
}
COMMON = {"evaluate_rounds": True, "local_steps": 4}
SCRIPT = f"""
import os, sys, warnings
import models, torch
import fedlora_hf.rounds.output
from fedlora_hf.adapter.slot import with_adapter
from peft import LoraConfig
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

fedlora_hf.rounds.output.write_report = lambda record, folder: []
os.fsync = lambda handle: None
clients = models.token_clients({SIZES}, held_out=3)
folder = sys.argv[1]

def tell(*words):  # one write a line, so that processes do not write into each other's
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def federation(name, **options):
    return models.federation(f"{{folder}}/{{name}}", clients, **{{"client_parallel": "data", **{COMMON}, **options}})

class AtStep(TrainerCallback):
    def __init__(self, number, act):
        self.number, self.act = number, act
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if torch.distributed.get_rank() == 1 and state.global_step == self.number:
            self.act(model)

def drift(model):
    next(p for p in model.parameters() if p.requires_grad).data.add_(1e-6)

# Whole runs.
for name, options in {RUNS}.items():
    federation(name, **options).train()

# The gradient of a step is DistributedDataParallel's.
trainer = federation("ddp")
number, count = trainer.processes.share
batches = [trainer.data_collator([trainer.clients["bob"].train[row]]) for row in range(2)]
items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
trained = [p for p in trainer.model.parameters() if p.requires_grad]
def loss(model):
    return model(**batches[number], num_items_in_batch=items).loss
wrapped = DistributedDataParallel(trainer.model)
(loss(wrapped) * count).backward()
expected = [p.grad.clone() for p in trained]
for p in trained:
    p.grad = None
def backward():
    value = loss(trainer.model)
    value.backward()
    return value.detach()
trainer.processes.add_gradients(trained, backward)
same = all(torch.equal(p.grad, q) for p, q in zip(trained, expected))
tell(number, "as DistributedDataParallel:", same)

# A client that fails on one process is nobody's success; the round goes on without it.
trainer = federation("failing")
train_client = trainer.train_client
def failing(client, number):
    trainer.data_collator = collate if client != "bob" or trainer.processes.first else (lambda rows: 1 / 0)
    return train_client(client, number)
collate, trainer.train_client = trainer.data_collator, failing
trainer.train()
tell(number, "failed:", sorted(trainer.run.record.quarantined))

# What stops one process stops all, with one line.
def stopped(name, callbacks=(), full=None, **options):
    trainer = federation(name, more={{"callbacks": list(callbacks)}}, **options)
    if full == number:
        trainer.store.save = no_space
    try:
        trainer.train()
    except Exception as error:
        tell(number, name, type(error).__name__, error)

stopped("drifting", [AtStep(2, drift)])
try:
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    federation("unseeded", model=with_adapter(models.tiny_llama(), config, seed=number), client_parallel="clients")
except Exception as error:
    tell(number, "unseeded", type(error).__name__, error)

def no_space(*args):
    raise OSError(28, "No space left on device")

stopped("few", server_min_clients=4)
stopped("apart", server_min_clients=4, client_parallel="clients")
stopped("full", full=0)
stopped("full_apart", full=1, client_parallel="clients")
"""


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """What two processes left and printed, working together on every client."""
    folder = tmp_path_factory.mktemp("together")
    return folder, launch(SCRIPT, folder, 2, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one_that_accumulates_twice(
    name: str, together: tuple[Path, list[str]], tmp_path: Path, bare_output: None
) -> None:
    """bob's 9 examples make an epoch of 5 micro-batches, eve's a single one: some steps leave a process without any."""
    clients = models.token_clients(SIZES, held_out=3)
    one = models.federation(tmp_path, clients, gradient_accumulation_steps=2, **{**COMMON, **RUNS[name]})
    one.train()
    found, expected = together[0] / name, tmp_path
    assert_same_adapters(expected, found, atol=1e-6)
    ours, record = (json.loads((folder / "run.json").read_text()) for folder in (expected, found))
    assert record["metrics"]["after"]["global"] == pytest.approx(ours["metrics"]["after"]["global"], rel=1e-6)
    for mine, theirs in zip(ours["rounds"], record["rounds"], strict=True):
        assert theirs["train_loss"] == pytest.approx(mine["train_loss"], rel=1e-6)


@pytest.mark.slow
def test_gradients_are_those_of_distributed_data_parallel(together: tuple[Path, list[str]]) -> None:
    assert [line for line in together[1] if "DistributedDataParallel" in line] == [
        f"{number} as DistributedDataParallel: True" for number in (0, 1)
    ]


@pytest.mark.slow
def test_a_client_that_fails_on_one_process_fails_on_all(together: tuple[Path, list[str]]) -> None:
    assert [line for line in together[1] if "failed:" in line] == ["0 failed: ['bob']", "1 failed: ['bob']"]
    record = json.loads((together[0] / "failing" / "run.json").read_text())
    assert "process 1: ZeroDivisionError" in record["quarantined"]["bob"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("drifting", "RoundError the adapter of 'ada' after its local steps: process 1 has come to another result"),
        ("unseeded", "ConfigError model: process 1 was given another adapter than process 0; pass peft_config"),
        ("few", "RoundError round 1: 3 usable updates, server_min_clients=4"),
        ("apart", "RoundError round 1: 3 usable updates, server_min_clients=4"),
    ],
)
def test_what_stops_one_process_stops_all_with_one_line(name: str, told: str, together: tuple[Path, list[str]]) -> None:
    lines = [line for line in together[1] if f" {name} " in line]
    assert [line[0] for line in lines] == ["0", "1"]
    assert lines[0][2:] == lines[1][2:]
    assert lines[0][2:].startswith(f"{name} {told}")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "where"), [("full", 0), ("full_apart", 1)])
def test_what_is_nobodys_fault_stops_all_and_is_told_where_it_happened(
    name: str, where: int, together: tuple[Path, list[str]]
) -> None:
    lines = {int(line[0]): line[2:] for line in together[1] if f" {name} " in line}
    assert lines[where] == f"{name} OSError [Errno 28] No space left on device"
    assert lines[1 - where] == f"{name} ProcessError process {where}: OSError: [Errno 28] No space left on device"
