"""Clients that turn and clients that return: influence by this round's evidence, flags by what adds up, drift."""
# SPDX-License-Identifier: Apache-2.0

import itertools
from collections.abc import Sequence

import pytest
import torch

from fedlora_hf.aggregation import aggregate
from fedlora_hf.aggregation.attacks import Known, attacked, backdoor
from fedlora_hf.aggregation.cohort import PastRound
from fedlora_hf.aggregation.over_rounds import MEMORY, drift, suspicion
from fedlora_hf.update import AdapterState, Aggregate, ClientUpdate, Evidence, LoraFactors

K, BAD, R, OUT, IN = 12, 3, 4, 40, 32
NAMES = [f"c{k:02d}" for k in range(K)]
TURNING = NAMES[:BAD]


def round_of(number: int, common: LoraFactors, attack: str | None) -> dict[str, AdapterState]:
    """A round's updates: a common part, an own one that is new in every round; the first BAD under the attack."""
    g = torch.Generator().manual_seed(100 + number)
    states = {}
    for name in NAMES:
        A, B = torch.randn(R, IN, generator=g), 0.6 * torch.randn(OUT, R, generator=g)
        A[:2], B[:, :2] = common.A, common.B
        states[name] = AdapterState({"m": LoraFactors(A, B)})
    if attack is None:
        return states
    honest = {name: state for name, state in states.items() if name not in TURNING}
    own = {name: state for name, state in states.items() if name in TURNING}
    wrong = AdapterState({"m": LoraFactors(torch.randn(R, IN, generator=g), torch.randn(OUT, R, generator=g))})
    return {**honest, **attacked(attack, Known(honest, own, wrong, round=number))}


def played(attacks: Sequence[str | None]) -> list[Aggregate]:
    """The aggregates of rounds in a row, one for each attack (None: all are honest)."""
    g = torch.Generator().manual_seed(1)
    common = LoraFactors(torch.randn(2, IN, generator=g), torch.randn(OUT, 2, generator=g))
    past: list[PastRound] = []
    found = []
    for number, attack in enumerate(attacks, 1):
        updates = [ClientUpdate(n, s) for n, s in round_of(number, common, attack).items()]
        found.append(aggregate(updates, "clair", past=tuple(past)))
        past.append(PastRound(found[-1].this_round or found[-1].evidence, frozenset(found[-1].flagged)))
    return found


def test_sleepers_lose_their_influence_in_the_round_they_turn_and_are_flagged_in_the_next() -> None:
    rounds = played([None, None, None, None, "sleepers", "sleepers", "sleepers"])
    assert [result.flagged for result in rounds[:5]] == [()] * 5
    assert all(rounds[3].influence[name] > 0.8 for name in NAMES)
    turned = rounds[4]
    assert all(turned.influence[name] == turned.weights[name] == 0 for name in TURNING)
    assert set(turned.suspicious) >= set(TURNING)
    assert all(turned.this_round[name]["drift"].score > 0.5 for name in TURNING)
    assert all(turned.this_round[name]["drift"].score < 0.5 for name in NAMES[BAD:])
    assert [result.flagged for result in rounds[5:]] == [tuple(TURNING)] * 2
    assert sorted(rounds[5].personalised) == NAMES[BAD:]


def test_slow_drift_is_followed_by_influence() -> None:
    rounds = played(["slow-drift"] * 8)
    kept = [sum(result.influence[name] for name in TURNING) / BAD for result in rounds]
    assert kept[0] > 0.8
    assert kept[-1] < 0.05
    assert all(later <= earlier + 0.1 for earlier, later in itertools.pairwise(kept))


def test_whoever_returns_is_taken_back_after_at_most_as_many_rounds_as_are_remembered() -> None:
    rounds = played(["sybils"] * 3 + [None] * MEMORY)
    assert rounds[2].flagged == tuple(TURNING)
    assert rounds[3].flagged == tuple(TURNING)
    back = [number for number, result in enumerate(rounds[3:], 1) if not result.flagged]
    assert back
    assert back[0] <= MEMORY
    assert all(rounds[2 + back[0]].influence[name] > 0.8 for name in TURNING)
    assert all(not result.flagged for result in rounds[2 + back[0] :])


def test_drift_is_against_ones_own_past() -> None:
    def found(direction: float, scale: float = 0.0, usable: bool = True) -> dict[str, Evidence]:
        return {"direction": Evidence(direction, 0.85 if usable else None), "scale": Evidence(scale, 1.0)}

    assert drift(found(0.7), []) is None
    assert drift(found(0.7), [found(0.6), found(0.6)]) == pytest.approx(0.1)
    assert drift(found(0.7, 0.9), [found(0.6), found(0.6)]) == pytest.approx(0.9)
    assert drift(found(0.7), [found(-5.0)] + [found(0.6)] * MEMORY) == pytest.approx(0.1)
    assert drift(found(0.7), [found(0.0, usable=False)]) == 0


def test_suspicion_is_half_of_the_way_to_a_line() -> None:
    quiet, near = {"direction": Evidence(0.4, 0.85)}, {"direction": Evidence(0.6, 0.85), "scale": Evidence(0.7, None)}
    beyond, turned = {"direction": Evidence(0.9, 0.85)}, {**quiet, "drift": Evidence(0.6, None)}
    now = {"quiet": quiet, "near": near, "beyond": beyond, "turned": turned, "flagged": beyond}
    named = suspicion(["flagged"], now, dict.fromkeys(now, quiet))
    assert sorted(named) == ["beyond", "near", "turned"]
    assert named["near"] == ("direction", pytest.approx(0.6 / 0.85))
    assert named["turned"] == ("drift", pytest.approx(1.2))


def test_a_backdoor_near_the_line_is_named() -> None:
    g = torch.Generator().manual_seed(1)
    common = LoraFactors(torch.randn(2, IN, generator=g), torch.randn(OUT, 2, generator=g))
    states = round_of(1, common, None)
    own = {name: states[name] for name in TURNING}
    known = Known({name: states[name] for name in NAMES[BAD:]}, own)
    found = aggregate([ClientUpdate(n, s) for n, s in {**states, **backdoor(known, 2.0)}.items()], "clair")
    assert set(found.suspicious) == set(TURNING)
    assert all(0.5 < share <= 1 for _, share in found.suspicious.values())
