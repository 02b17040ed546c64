"""Shares of a client's batches, and what a process says to itself when it is alone."""
# SPDX-License-Identifier: Apache-2.0

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora_hf import FederatedConfig
from fedlora_hf.data.collate import Collator
from fedlora_hf.errors import ConfigError
from fedlora_hf.launch.processes import Processes
from fedlora_hf.training.local import local_batches, num_local_steps
from fedlora_hf.training.metrics import held_out_metrics


def collate(rows: list[int]) -> dict[str, Any]:
    return {"labels": torch.tensor(rows)}


def settings(batch: int, accumulation: int) -> Any:
    args = FederatedConfig(**models.options("unused", gradient_accumulation_steps=accumulation))
    args.per_device_train_batch_size = batch
    return args


@given(
    examples=st.integers(1, 30), batch=st.integers(1, 4), accumulation=st.integers(1, 3), processes=st.integers(1, 4)
)
def test_shares_are_one_process_with_more_accumulation(
    examples: int, batch: int, accumulation: int, processes: int
) -> None:
    """Micro-batch i of a step is process i mod N's; where the epoch ends before its turn a process has one less."""
    args, rows = settings(batch, accumulation), list(range(examples))
    many = settings(batch, accumulation * processes)
    steps = 2 * num_local_steps(SimpleNamespace(**{**vars(args), "local_steps": None}), examples, processes) + 1
    whole = islice(local_batches(rows, collate, many, 7), steps)
    shares = [local_batches(rows, collate, args, 7, share=(number, processes)) for number in range(processes)]
    for step, parts in zip(whole, zip(*shares, strict=True), strict=False):
        dealt = [part[turn] for turn in range(accumulation) for part in parts if turn < len(part)]
        assert [batch["labels"].tolist() for batch in dealt] == [batch["labels"].tolist() for batch in step]


def test_an_even_share_ends_with_a_batch_without_labels() -> None:
    """7 examples are 4 micro-batches of 2, the last of 1: 3 processes have a step of 3 and one of 1."""
    rows, args = list(range(7)), settings(2, 1)
    steps = [
        list(islice(local_batches(rows, collate, args, 0, share=(number, 3), even=True), 2)) for number in range(3)
    ]
    assert [[len(step) for step in process] for process in steps] == [[1, 1]] * 3
    assert (steps[0][1][0]["labels"] >= 0).all()
    for process in steps[1:]:
        assert (process[1][0]["labels"] == -100).all()


def test_steps_of_an_epoch_are_fewer_with_more_processes() -> None:
    args = SimpleNamespace(
        local_steps=None, local_epochs=1.0, per_device_train_batch_size=2, gradient_accumulation_steps=1
    )
    assert [num_local_steps(args, 9, processes) for processes in (1, 2, 3, 8)] == [5, 3, 2, 1]


def test_processes_that_accelerate_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun on a machine without a GPU: each would take itself for the only one, and write what the others write."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    accelerator: Any = SimpleNamespace(process_index=0, num_processes=1)
    with pytest.raises(ConfigError, match="2 processes were started, and there is no GPU; pass --use_cpu"):
        Processes(accelerator)


class Shares(Processes):
    """One of three processes that evaluates with others, whose part of the sum is asked for below."""

    def __init__(self, number: int, lockstep: bool) -> None:
        self.number, self.count, self.together, self.lockstep = number, 3, True, lockstep

    def total(self, work: Any, like: torch.Tensor) -> torch.Tensor:
        self.part = work()
        return self.part


@pytest.mark.parametrize("lockstep", [False, True])
def test_held_out_sums_of_all_shares_are_the_whole(lockstep: bool) -> None:
    """5 batches over 3 processes: in lockstep the third goes through one more, which does not count."""
    model, examples = models.tiny_llama(), models.token_examples(9, seed=1)
    whole = held_out_metrics(model, examples, Collator(0), task="causal_lm", batch_size=2)
    forwards, parts = [], torch.zeros(3, dtype=torch.float64)
    for number in range(3):
        seen: list[int] = []
        hook = model.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        processes = Shares(number, lockstep)
        held_out_metrics(model, examples, Collator(0), task="causal_lm", batch_size=2, processes=processes)
        hook.remove()
        forwards.append(len(seen))
        parts += processes.part.view(-1, 3).sum(0)  # a row for every example
    assert forwards == ([2, 2, 2] if lockstep else [2, 2, 1])
    assert parts[2] == whole["num_items"]
    assert float(parts[0] / parts[2]) == pytest.approx(whole["loss"], rel=1e-12)


def test_alone_nothing_is_said(tmp_path: Path) -> None:
    processes = models.federation(tmp_path, client_parallel="data").processes
    assert (processes.first, processes.writes, processes.together, processes.share) == (True, True, False, (0, 1))
    assert list(processes.taken(["b", "a"])) == ["b", "a"]
    assert processes.gathered({"b": 1, "a": 2}) == {"a": 2, "b": 1}
    assert processes.agreed(3) == 3
    with pytest.raises(ZeroDivisionError), processes.all_or_none():
        raise ZeroDivisionError
