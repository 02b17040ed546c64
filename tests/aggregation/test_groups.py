"""Aggregating group by group: each as if it were alone, nothing crosses over, too few keep what they had."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from sample_updates import SHAPES, dense, relative, same_bits

from fedlora_hf.aggregation import aggregate
from fedlora_hf.aggregation.groups import Standing, aggregate_groups
from fedlora_hf.errors import UpdateError
from fedlora_hf.methods.clair import FIRST, ClairOptions
from fedlora_hf.update import AdapterState, Aggregate, ClientUpdate, LoraFactors, state_sum

MANY, FEW = [f"a{k}" for k in range(7)], ["b0", "b1", "b2"]


def adapter(seed: int, size: float = 1.0, rank: int = 2) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for module, (out, width) in SHAPES.items():
        A, B = torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator)
        state[module] = LoraFactors(A, B * size)
    return AdapterState(state)


def sent(tasks: Mapping[str, int], starts: Mapping[str, AdapterState] | None = None) -> list[ClientUpdate]:
    """What clients hold that learned these tasks (named by a seed), each a little of its own, from their starts."""
    updates = []
    for place, (client, task) in enumerate(tasks.items()):
        learned = state_sum(adapter(task), adapter(1000 + place, 0.15))
        start = (starts or {}).get(client)
        updates.append(ClientUpdate(client, learned if start is None else state_sum(start, learned), 10))
    return updates


def rule(updates: Sequence[ClientUpdate], *, method: str, reference: Any, since: int) -> Aggregate:
    return aggregate(updates, method, reference=reference)


def first_round(updates: Sequence[ClientUpdate]) -> Aggregate:
    return aggregate_groups(updates, {FIRST: Standing((), None)}, 1, rule, ClairOptions())


def standing(found: Aggregate) -> dict[str, Standing]:
    return {name: Standing(group.clients, group.state, group.since) for name, group in found.groups.items()}


def test_each_group_is_aggregated_as_if_it_were_alone() -> None:
    updates = sent(dict.fromkeys(MANY, 1) | dict.fromkeys(FEW, 2))
    found = first_round(updates)
    assert {name: group.clients for name, group in found.groups.items()} == {"1": tuple(MANY), "2": tuple(FEW)}
    for name, ids in (("1", MANY), ("2", FEW)):
        alone = aggregate([update for update in updates if update.client_id in ids], "clair")
        assert same_bits(found.groups[name].state, alone.state)
        assert all(same_bits(found.personalised[client], alone.personalised[client]) for client in ids)
        assert abs(sum(found.weights[client] for client in ids) - 1) < 1e-12
    assert same_bits(found.state, found.groups["1"].state)
    assert not found.flagged  # with one adapter for all they are
    assert set(aggregate(updates, "clair").flagged) == set(FEW)
    assert "collude and an honest minority look alike" in found.diagnosis["groups"]


def test_clients_of_one_kind_get_what_they_get_without_groups() -> None:
    updates = sent(dict.fromkeys([*MANY, *FEW], 1))
    found, plain = first_round(updates), aggregate(updates, "clair")
    assert list(found.groups) == ["1"]
    assert same_bits(found.state, plain.state)
    assert found.weights == plain.weights
    assert found.evidence == plain.evidence
    assert "groups" not in found.diagnosis


def test_a_client_alone_is_flagged_and_two_that_collude_are_a_group() -> None:
    lonely = first_round(sent(dict.fromkeys(MANY, 1) | {"x": 3, "y": 4}))
    assert list(lonely.groups) == ["1"]
    assert set(lonely.flagged) == {"x", "y"}
    pair = first_round(sent(dict.fromkeys(MANY, 1) | {"x": 3, "y": 3, "z": 4}))
    assert pair.groups["2"].clients == ("x", "y")
    assert pair.flagged == ("z",)
    # What the majority gets is what it gets without any of them.
    without = aggregate(sent(dict.fromkeys(MANY, 1)), "clair").state
    assert relative(dense(pair.state), dense(without)) < 1e-6


def test_a_later_round_judges_every_group_by_what_it_started_from() -> None:
    first = first_round(sent(dict.fromkeys(MANY, 1) | dict.fromkeys(FEW, 2)))
    starts = {client: group.state for group in first.groups.values() for client in group.clients}
    updates = sent(dict.fromkeys(MANY, 5) | dict.fromkeys(FEW, 5), starts)  # now they learn the same
    found = aggregate_groups(updates, standing(first), 2, rule, ClairOptions())
    assert {name: group.clients for name, group in found.groups.items()} == {"1": tuple(MANY), "2": tuple(FEW)}
    assert [group.since for group in found.groups.values()] == [0, 1]
    assert not found.flagged
    for name, group in found.groups.items():
        moved = state_sum(first.groups[name].state, adapter(5))
        assert relative(dense(group.state), dense(moved)) < 0.1


def test_a_group_may_part_again_and_takes_a_new_name() -> None:
    first = first_round(sent(dict.fromkeys(MANY, 1) | dict.fromkeys(FEW, 2)))
    starts = {client: group.state for group in first.groups.values() for client in group.clients}
    tasks = dict.fromkeys(MANY[:4], 6) | dict.fromkeys(MANY[4:], 7) | dict.fromkeys(FEW, 8)
    found = aggregate_groups(sent(tasks, starts), standing(first), 2, rule, ClairOptions())
    assert {name: group.clients for name, group in found.groups.items()} == {
        "1": tuple(MANY[:4]), "2": tuple(FEW), "3": tuple(MANY[4:])
    }  # fmt: skip
    assert [group.since for group in found.groups.values()] == [0, 1, 2]


def test_a_group_whose_updates_do_not_come_keeps_its_adapter() -> None:
    first = first_round(sent(dict.fromkeys(MANY, 1) | dict.fromkeys(FEW, 2)))
    starts = {client: group.state for group in first.groups.values() for client in group.clients}
    tasks = dict.fromkeys(MANY, 5) | {FEW[0]: 5, FEW[1]: 5}
    found = aggregate_groups(sent(tasks, starts), standing(first), 2, rule, ClairOptions())
    assert found.groups["2"].clients == tuple(FEW)
    assert same_bits(found.groups["2"].state, first.groups["2"].state)
    assert FEW[0] not in found.weights
    assert MANY[0] in found.weights
    broken = [replace(u, state=AdapterState({})) if u.client_id in FEW else u for u in sent(tasks, starts)]
    found = aggregate_groups(broken, standing(first), 2, rule, ClairOptions())
    assert set(found.quarantined) == set(FEW[:2])
    few = [update for update in sent(tasks, starts) if update.client_id in FEW]
    with pytest.raises(UpdateError):  # of the first group's clients somebody has to be there
        aggregate_groups(few, standing(first), 2, rule, ClairOptions())


def test_the_order_of_updates_changes_no_bit() -> None:
    updates = sent(dict.fromkeys(MANY, 1) | dict.fromkeys(FEW, 2))
    one, two = first_round(updates), first_round(updates[::-1])
    assert all(same_bits(one.groups[name].state, two.groups[name].state) for name in ("1", "2"))
