"""Judging in one process: the losses are the scorer's, the plan is counts', and a run keeps what was found."""
# SPDX-License-Identifier: Apache-2.0

from itertools import islice
from pathlib import Path
from typing import Any

import models
import pytest
import torch

from fedlora_hf import FederatedTrainer
from fedlora_hf.numerics.clair.influence import UNHARMED
from fedlora_hf.numerics.evidence import Evidence
from fedlora_hf.rounds.judges import Effect, Functional, functional_evidence, mixture
from fedlora_hf.rounds.judging import measured, planned, seed_of
from fedlora_hf.rounds.panel import CHEAP, Panel, Split, rows_drawn
from fedlora_hf.training.local import local_batches, trained_rows
from fedlora_hf.training.metrics import row_scores

CLIENTS = [f"c{number}" for number in range(6)]


def federation(folder: Path, **options: Any) -> FederatedTrainer:
    clients = models.token_clients(dict.fromkeys(CLIENTS, 9), held_out=4)
    return models.federation(folder, clients, **{"aggregation": "clair", "per_device_train_batch_size": 9, **options})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[FederatedTrainer, list[Any]]:
    """A federation and its clients' updates of one round."""
    trainer = federation(tmp_path_factory.mktemp("judging"), local_steps=4)
    return trainer, [trainer.train_client(client, 1) for client in trainer.clients]


def test_the_loss_of_rows_adds_up_to_the_splits(trained: tuple[FederatedTrainer, list[Any]]) -> None:
    trainer, updates = trained
    splits = {client: trainer.clients[client].validation for client in CLIENTS[:3]}
    rows = [row for split in splits.values() for row in split]
    owners = [client for client, split in splits.items() for _ in split]
    found = trainer.scorer.losses(updates[0].state, rows, owners)
    for client, split in splits.items():
        assert found[client] == pytest.approx(trainer.scorer.metrics(updates[0].state, split)["loss"], rel=1e-5)


def test_a_classifier_has_one_item_a_row(tmp_path: Path) -> None:
    clients = models.token_clients({"a": 5, "b": 5}, make=models.class_examples, held_out=3)
    model = models.tiny_classifier()
    trainer = models.federation(tmp_path, clients, task="sequence_classification", model=model)
    split = trainer.clients["a"].validation
    found = trainer.scorer.losses(trainer.initial, list(split), ["a"] * len(split))
    assert found["a"] == pytest.approx(trainer.scorer.metrics(trainer.initial, split)["loss"], rel=1e-5)
    nats = row_scores(trainer.model, list(split), trainer.data_collator, task="sequence_classification", batch_size=2)
    assert nats[:, 2].tolist() == [1.0] * 3


def test_what_is_measured_is_what_the_rule_is_given(trained: tuple[FederatedTrainer, list[Any]]) -> None:
    trainer, updates = trained
    splits = {client: trainer.clients[client].validation for client in CLIENTS}
    influence = dict.fromkeys(CLIENTS, 1.0) | {"c3": 0.0, "c4": 0.4}
    panel, mean = Panel(dict.fromkeys(CLIENTS, 2), 0.05), updates[1].state
    found = measured(
        trainer.scorer, panel, splits, trainer.initial, mean, influence, updates, trainer.processes, seed=7
    )
    places = rows_drawn(dict.fromkeys(CLIENTS, 2), {client: Split(4, 0.0) for client in CLIENTS}, 7)
    heard = [client for client in CLIENTS if influence[client]]  # c3, without influence, is not asked

    def losses(state: Any) -> dict[str, float]:
        return {c: trainer.scorer.metrics(state, splits[c].select(places[c]))["loss"] for c in heard}

    beside = [losses(state) for state in (trainer.initial, mean, mixture(mean, trainer.initial))]
    mixed = {update.client_id: losses(mixture(mean, update.state)) for update in updates}
    expected = functional_evidence(*beside, mixed, influence)
    assert set(found.facts["judges"]) == set(heard)
    assert found.facts["cost"] == 0.05
    for client in CLIENTS:
        assert found.evidence[client].threshold == expected.evidence[client].threshold
        assert found.evidence[client].score == pytest.approx(expected.evidence[client].score, abs=1e-3)
        assert found.effects[client].change == pytest.approx(expected.effects[client].change, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"local_steps": 7},
        {"local_steps": None, "local_epochs": 2.0, "gradient_accumulation_steps": 2},
        {"local_steps": 10, "dataloader_drop_last": True},
    ],
)
def test_the_rows_that_training_sees_are_counted(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = federation(tmp_path, **{"per_device_train_batch_size": 2, **options})
    data = trainer.clients["c0"].train
    steps = trainer.num_local_steps(trainer.clients["c0"])
    batches = islice(local_batches(data, trainer.data_collator, trainer.args, 0), steps)
    seen = sum(len(batch["input_ids"]) for step in batches for batch in step)
    assert trained_rows(trainer.args, len(data)) == pytest.approx(seen, rel=0.15)


def test_auto_asks_everybody_where_it_is_cheap_and_nobody_elsewhere(tmp_path: Path) -> None:
    trainer = federation(tmp_path / "long", local_steps=20)
    panel = planned(trainer.args, trainer.clients, CLIENTS, 0)
    assert panel is not None
    assert set(panel.examples) == set(CLIENTS)
    assert panel.cost < CHEAP
    short = federation(tmp_path / "short", local_steps=2)
    assert planned(short.args, short.clients, CLIENTS, 0) is None
    some = federation(tmp_path / "some", local_steps=2, functional_judges=2)
    panel = planned(some.args, some.clients, CLIENTS, 0)
    assert panel is not None
    assert set(panel.examples.values()) == {4}
    assert len(panel.examples) == 3
    bare = models.federation(tmp_path / "bare", models.token_clients(dict.fromkeys(CLIENTS, 9)), aggregation="clair")
    assert planned(bare.args, bare.clients, CLIENTS, 0) is None


def test_a_run_takes_keeps_and_tells_what_was_found(tmp_path: Path) -> None:
    trainer = federation(tmp_path / "judged", local_steps=20, num_rounds=2)
    trainer.train()
    for entry in trainer.run.record.rounds:
        assert all(
            {"functional", "subspace", "direction", "scale"} == set(kinds) - {"drift"}
            for kinds in entry["evidence"].values()
        )
        assert set(entry["effects"]) == set(CLIENTS)
        assert entry["judging"]["cost"] < CHEAP
        assert entry["seconds"]["judge"] > 0
    facts = trainer.run.record.clients["c0"]
    assert facts["effect"] == trainer.run.record.rounds[-1]["effects"]["c0"]
    assert "functional" in facts["evidence"]
    assert set(trainer.store.functional(2).evidence) == set(CLIENTS)
    without = federation(tmp_path / "without", local_steps=20, num_rounds=1, functional_judges=0)
    without.train()
    assert "functional" not in without.run.record.clients["c0"]["evidence"]
    assert {"effects", "judging"}.isdisjoint(without.run.record.rounds[0])


def test_whom_the_judges_find_is_left_out_and_a_clean_round_keeps_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ran(name: str, **options: Any) -> FederatedTrainer:
        trainer = federation(tmp_path / name, local_steps=20, num_rounds=1, **options)
        trainer.train()
        return trainer

    plain, judged = ran("plain", functional_judges=0), ran("judged")
    found = judged.store.functional(1).evidence.values()
    assert all(evidence.threshold is None or evidence.score <= UNHARMED * evidence.threshold for evidence in found)
    for module, factors in plain.run.state.items():
        assert torch.equal(factors.A, judged.run.state[module].A)
        assert torch.equal(factors.B, judged.run.state[module].B)

    def harmful(*args: Any, **more: Any) -> Functional:
        evidence = {client: Evidence(0.5 if client == "c2" else -0.1, 0.1) for client in CLIENTS}
        return Functional(evidence, {"c2": Effect(5, 5, 0.3)}, {"judges": {}})

    monkeypatch.setattr("fedlora_hf.rounds.local_transport.measured", harmful)
    flagged = ran("flagged")
    assert flagged.run.record.flagged == ["c2"]
    assert flagged.run.record.clients["c2"]["weight"] == 0


def test_judging_is_a_function_of_the_seed_and_the_round(tmp_path: Path) -> None:
    args = federation(tmp_path).args
    assert seed_of(args, 1) == seed_of(args, 1) != seed_of(args, 2)
