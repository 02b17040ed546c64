"""An optimizer's state from a client's round to its next: to the bit, and never that of other parameters."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import models
import pytest
import sample_updates
import torch
from torch import nn

from fedlora_hf.training.moments import moments_of, restore

pytestmark = pytest.mark.usefixtures("bare_output")


def stepped(size: int, steps: int) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    parameter = nn.Parameter(torch.zeros(size))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    for _ in range(steps):
        parameter.grad = torch.arange(size, dtype=torch.float32)
        optimizer.step()
    return parameter, optimizer


def test_a_restored_optimizer_goes_on_to_the_bit() -> None:
    whole, _ = stepped(3, 4)
    half, optimizer = stepped(3, 2)
    fresh = torch.optim.AdamW([half], lr=0.1)
    assert restore(fresh, moments_of(optimizer))
    for _ in range(2):
        half.grad = torch.arange(3, dtype=torch.float32)
        fresh.step()
    assert torch.equal(half, whole)


def test_a_state_of_other_parameters_is_left() -> None:
    _, other = stepped(4, 1)
    parameter, _ = stepped(3, 0)
    fresh = torch.optim.AdamW([parameter], lr=0.1)
    assert not restore(fresh, moments_of(other))
    assert not restore(fresh, b"damaged")
    assert not fresh.state


def test_kept_optimizers_make_one_client_s_rounds_one_training(tmp_path: Path) -> None:
    """One client, no dropout, whole batches: two rounds of two steps are one of four when the moments are kept."""

    def result(folder: str, rounds: int, steps: int, keep: bool) -> torch.Tensor:
        trainer = models.federation(
            tmp_path / folder,
            {"solo": {"train": models.token_examples(4, seed=1)}},
            num_rounds=rounds,
            local_steps=steps,
            per_device_train_batch_size=4,
            train_sampling_strategy="sequential",
            keep_optimizer=keep,
        )
        trainer.train()
        return sample_updates.dense(trainer.run.state)

    one = result("one", 1, 4, False)
    assert sample_updates.relative(result("kept", 2, 2, True), one) < 1e-6
    assert sample_updates.relative(result("fresh", 2, 2, False), one) > 1e-3


def test_a_resumed_run_finds_the_moments(tmp_path: Path) -> None:
    def federated(rounds: int, folder: str) -> models.FederatedTrainer:
        return models.federation(tmp_path / folder, num_rounds=rounds, clients_per_round=2, keep_optimizer=True)

    whole = federated(3, "whole")
    whole.train()
    federated(2, "parts").train()
    again = federated(3, "parts")
    again.train(resume_from_checkpoint=True)
    assert sample_updates.same_bits(again.run.state.in_memory(), whole.run.state.in_memory())
