"""Functional evidence: whoever harms others more than is usual is flagged, at the cost that is stated, and no more."""
# SPDX-License-Identifier: Apache-2.0

import math
from pathlib import Path
from typing import Any

import models
import pytest
import torch

from fedlora_hf.rounds.judges import drawn_panel, functional_evidence, judged
from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors

RANK = 2
NAMES = [f"client-{number:02d}" for number in range(10)]


def state(value: float) -> AdapterState:
    """An adapter of one module, W = value * (a fixed matrix)."""
    return AdapterState({"m": LoraFactors(torch.ones(RANK, 3), value * torch.ones(4, RANK) / RANK)})


class Valley:
    """A scorer of a toy model: the loss of a judge is (the adapter's value - what the judge wants)^2 + 1."""

    rank = RANK

    def __init__(self) -> None:
        self.seen: list[tuple[float, Any]] = []

    def metrics(self, adapter: AdapterState, wanted: list[float]) -> dict[str, float]:
        value = float(adapter["m"].dense()[0, 0])
        self.seen.append((value, wanted))
        return {"loss": (value - wanted[0]) ** 2 + 1}


def cohort(values: dict[str, float]) -> list[ClientUpdate]:
    return [ClientUpdate(name, state(value)) for name, value in values.items()]


def near_one(bad: dict[str, float] | None = None) -> dict[str, float]:
    """Ten honest clients whose updates lie about 1, some replaced."""
    return {name: 1 + 0.01 * number for number, name in enumerate(NAMES)} | (bad or {})


def wants(**others: float) -> dict[str, list[float]]:
    return {name: [others.get(name, 1.0)] for name in NAMES}


def test_harmful_clients_are_flagged_and_no_others() -> None:
    bad = {NAMES[0]: -1.0, NAMES[4]: 6.0, NAMES[7]: -3.0}
    found = functional_evidence(Valley(), state(0.0), cohort(near_one(bad)), wants())  # type: ignore[arg-type]
    assert {name for name, evidence in found.evidence.items() if evidence.flagged} == set(bad)
    assert list(found.evidence) == NAMES
    assert found.changes[NAMES[0]] == pytest.approx(3.0)  # from (0 - 1)^2 to (-1 - 1)^2


def test_a_clean_cohort_has_no_flags() -> None:
    found = functional_evidence(Valley(), state(0.0), cohort(near_one()), wants())  # type: ignore[arg-type]
    assert not any(evidence.flagged for evidence in found.evidence.values())
    assert all(abs(evidence.score) < 0.05 for evidence in found.evidence.values())  # all of them help alike


def test_whoever_helps_less_than_others_is_not_flagged() -> None:
    values = near_one({NAMES[3]: 0.1})
    found = functional_evidence(Valley(), state(0.0), cohort(values), wants(), judges=9)  # type: ignore[arg-type]
    assert found.changes[NAMES[3]] < 0
    assert found.evidence[NAMES[3]].score < 1


def test_whoever_harms_where_most_help_is_flagged_however_unequal_their_help() -> None:
    help_of_the_honest = [-4.8, -4.2, -4.1, -3.9, -3.7, -3.2, -0.1]
    changes = {f"{k:02d}": change for k, change in enumerate([*help_of_the_honest, *(1.5 + 0.1 * k for k in range(5))])}
    found = judged(changes, 6.0)
    assert [name for name, evidence in found.items() if evidence.flagged] == ["07", "08", "09", "10", "11"]
    assert not judged({**changes, "06": 0.1}, 6.0)["06"].flagged  # next to nothing


def test_where_most_help_nobody_lack_of_help_tells_nothing() -> None:
    assert judged({"a": 0.1, "b": -0.1, "c": 3.0}, 5.0)["c"].threshold is None
    assert judged({"a": -0.04, "b": -0.04, "c": 3.0}, 5.0)["c"].threshold is None  # less than 1 % of the loss
    assert judged({"a": -1.0, "b": -1.1, "c": 3.0}, 5.0)["c"].flagged


def test_lying_judges_are_outvoted_while_they_are_fewer_than_half() -> None:
    bad = dict.fromkeys(NAMES[:4], -1.0)
    spoiled = wants(**dict.fromkeys(NAMES[:4], -1.0))
    found = functional_evidence(Valley(), state(0.0), cohort(near_one(bad)), spoiled, judges=9)  # type: ignore[arg-type]
    assert {name for name, evidence in found.evidence.items() if evidence.flagged} == set(bad)


def test_the_cost_is_what_is_said() -> None:
    scorer = Valley()
    found = functional_evidence(scorer, state(0.0), cohort(near_one()), wants(), judges=3)  # type: ignore[arg-type]
    assert len(drawn_panel(wants(), 4, 0)) == 4
    assert found.evaluations == len(scorer.seen) == 4 + 4 * 3 + 6 * 4


def test_the_panel_is_a_function_of_the_seed_and_the_clients() -> None:
    assert drawn_panel(wants(), 4, 3) == drawn_panel(dict(reversed(wants().items())), 4, 3)
    assert len(set(drawn_panel(wants(), 4, 3))) == 4
    assert drawn_panel(wants(), 99, 0) == NAMES
    assert len({tuple(drawn_panel(wants(), 4, seed)) for seed in range(20)}) > 10
    forwards = functional_evidence(Valley(), state(0.0), cohort(near_one()), wants(), judges=2)  # type: ignore[arg-type]
    backwards = functional_evidence(
        Valley(),  # type: ignore[arg-type]
        state(0.0),
        reversed(cohort(near_one())),
        dict(reversed(wants().items())),
        judges=2,
    )
    assert forwards == backwards


def test_a_later_round_is_measured_from_its_start() -> None:
    scorer, start = Valley(), state(2.0)
    functional_evidence(scorer, start, cohort({"a": 1.0, "b": 1.1, "c": 1.2}), {"a": [1.0], "b": [1.0]})  # type: ignore[arg-type]
    values = {round(value, 3) for value, _ in scorer.seen}
    assert values == {2.0, 1.0, 1.1, 1.2}  # the start, and each whole adapter


def test_clients_without_data_judge_nobody_but_are_judged() -> None:
    few = {NAMES[0]: [1.0], NAMES[1]: [1.0], NAMES[2]: [], NAMES[3]: None}
    scorer = Valley()
    found = functional_evidence(scorer, state(0.0), cohort(near_one({NAMES[5]: -2.0})), few)  # type: ignore[arg-type]
    assert found.evidence[NAMES[5]].flagged
    assert {id(wanted) for _, wanted in scorer.seen} <= {id(few[NAMES[0]]), id(few[NAMES[1]])}


def test_nobody_is_flagged_where_nobody_can_judge() -> None:
    alone = functional_evidence(Valley(), state(0.0), cohort(near_one()), {})  # type: ignore[arg-type]
    assert {evidence.threshold for evidence in alone.evidence.values()} == {None}
    assert alone.evaluations == 0
    two = functional_evidence(Valley(), state(0.0), cohort({"a": 1.0, "b": -9.0}), {"a": [1.0], "b": [1.0]})  # type: ignore[arg-type]
    assert {evidence.threshold for evidence in two.evidence.values()} == {None}


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_breaks_is_harm(broken: float) -> None:
    class Cliff(Valley):
        def metrics(self, adapter: AdapterState, wanted: list[float]) -> dict[str, float]:
            value = float(adapter["m"].dense()[0, 0])
            return {"loss": broken} if value > 50 else super().metrics(adapter, wanted)

    found = functional_evidence(Cliff(), state(0.0), cohort(near_one({NAMES[2]: 60.0})), wants())  # type: ignore[arg-type]
    assert [name for name, evidence in found.evidence.items() if evidence.flagged] == [NAMES[2]]
    assert all(math.isfinite(evidence.score) for evidence in found.evidence.values())


def test_a_trainers_scorer_and_clients_do(tmp_path: Path) -> None:
    trainer = models.federation(tmp_path, models.token_clients(dict.fromkeys("abcd", 6), held_out=3))
    before = {
        c: trainer.scorer.metrics(trainer.initial, data.validation)["loss"] for c, data in trainer.clients.items()
    }
    updates = [trainer.train_client(client, 1) for client in trainer.clients]
    validation = {client: data.validation for client, data in trainer.clients.items()}
    found = functional_evidence(trainer.scorer, trainer.initial, updates, validation, judges=3, seed=trainer.args.seed)
    after = [trainer.scorer.metrics(updates[0].state, validation[judge])["loss"] - before[judge] for judge in "bcd"]
    assert found.changes["a"] == pytest.approx(sorted(after)[1])
    assert found.evaluations == 4 + 4 * 3
