"""Adapters scored side by side: the losses that each has by itself, whatever its rank, its head and its kind."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path
from typing import Any

import models
import pytest
import torch

from fedlora_hf.training.side_scores import losses_of_each, owners_losses, row_losses_of_each
from fedlora_hf.update import AdapterState, LoraFactors

pytestmark = pytest.mark.usefixtures("bare_output")


def drawn(state: AdapterState, seed: int, rank: int) -> AdapterState:
    """An adapter for the same modules, of any rank and scale."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for module, own in state.items():
        out, inner = own.shape
        A, B = torch.randn(rank, inner, generator=generator), torch.randn(out, rank, generator=generator)
        factors[module] = LoraFactors(A, B, 0.1 + seed / 10)
    extras = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in state.extras.items()}
    return AdapterState(factors, extras)


@pytest.mark.parametrize(
    "changes",
    [{}, {"adapter": "dirmag"}, {"task": "sequence_classification"}],
    ids=["lora", "dirmag", "head"],
)
def test_each_has_the_loss_it_has_alone(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Ranks below, at and above the model's own; three at once of four."""
    model, make = models.tiny_llama(), models.token_examples
    if changes.get("task"):
        model, make = models.tiny_classifier(), models.class_examples
    clients = models.token_clients({"ada": 4}, make=make, held_out=5)
    trainer = models.federation(tmp_path, clients, model=model, clients_at_once=3, **changes)
    trainer.args.per_device_eval_batch_size = 2
    split = trainer.clients["ada"].validation
    states = [drawn(trainer.initial, seed, rank) for seed, rank in enumerate((2, 1, 3, 2))]
    trainer.scorer.install(trainer.initial)
    before = trainer.slot.checksum()
    found = losses_of_each(trainer.scorer, states, split)
    assert trainer.slot.checksum() == before
    assert trainer.model.training is model.training
    assert found == pytest.approx([trainer.scorer.metrics(state, split)["loss"] for state in states], abs=1e-5)
    assert len({round(loss, 3) for loss in found}) == 4
    rows = row_losses_of_each(trainer.scorer, states[:1], split)[0]
    assert rows.shape == (5, 2)
    assert float(rows[:, 0].sum() / rows[:, 1].sum()) == pytest.approx(found[0], abs=1e-6)


def test_a_personal_choice_is_the_same_side_by_side(tmp_path: Path) -> None:
    clients = models.token_clients({"ada": 4, "bob": 6, "eve": 5}, held_out=4)

    def chosen(count: int) -> dict[str, Any]:
        trainer = models.federation(tmp_path / str(count), clients, clients_at_once=count, learning_rate=0.1)
        trainer.train()
        return {client: facts["personal"] for client, facts in trainer.run.record.clients.items()}

    alone, together = chosen(1), chosen(3)
    assert len(alone["ada"]["validation_loss"]) > 2
    for client, facts in alone.items():
        assert together[client]["choice"] == facts["choice"]
        assert together[client]["validation_loss"] == pytest.approx(facts["validation_loss"], abs=1e-4)


def test_several_owners_rows_are_scored_under_several_adapters_at_once(tmp_path: Path) -> None:
    """As judges do: every adapter on rows of several clients, each client's loss by itself."""
    clients = models.token_clients({"ada": 4, "bob": 6}, held_out=4)
    trainer = models.federation(tmp_path, clients, clients_at_once=2)
    splits = {client: trainer.clients[client].validation for client in ("ada", "bob")}
    rows, owners = (
        [row for split in splits.values() for row in split],
        [c for c, split in splits.items() for _ in split],
    )
    states = [drawn(trainer.initial, seed, rank) for seed, rank in enumerate((2, 1, 3))]
    found = list(owners_losses(trainer.scorer, iter(states), rows, owners))
    assert len(found) == 3
    for state, losses in zip(states, found, strict=True):
        expected = {client: trainer.scorer.metrics(state, split)["loss"] for client, split in splits.items()}
        assert losses == pytest.approx(expected, abs=1e-5)
        assert losses == pytest.approx(trainer.scorer.losses(state, rows, owners), abs=1e-5)
