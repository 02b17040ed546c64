"""Functional evidence: whoever undoes what a round gives the others is flagged, whatever a minority of judges says."""
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from fedlora_hf.rounds.judges import (
    BROKEN,
    HARM,
    MIXED,
    Functional,
    functional_evidence,
    mixture,
    weighted_median,
)
from fedlora_hf.update import AdapterState, LoraFactors

NAMES = [f"client-{number:02d}" for number in range(12)]
EQUAL = dict.fromkeys(NAMES, 1.0)


def alike(loss: float) -> dict[str, float]:
    """The same loss of every judge, but for a little of its own."""
    return {name: loss + 0.001 * number for number, name in enumerate(NAMES)}


def losses(harm: dict[str, float] | None = None) -> dict[str, dict[str, float]]:
    """{client: losses with its share}: 0.05 above the mean's 1.0 for honest clients, or what is said."""
    return {name: alike((harm or {}).get(name, 1.05 + 0.005 * number)) for number, name in enumerate(NAMES)}


def found_in(
    mixed: dict[str, dict[str, float]], influence: dict[str, float] = EQUAL, start: float = 5.0, diluted: float = 1.4
) -> Functional:
    return functional_evidence(alike(start), alike(1.0), alike(diluted), mixed, influence)


def flagged(found: Functional) -> set[str]:
    return {client for client, evidence in found.evidence.items() if evidence.flagged}


def test_whoever_undoes_what_the_round_gives_is_flagged_and_nobody_else() -> None:
    found = found_in(losses({"client-03": 3.0, "client-07": 2.8}))
    assert flagged(found) == {"client-03", "client-07"}
    assert found.evidence["client-03"].score == pytest.approx((3.0 - 1.4) / 4, abs=1e-3)
    assert found.evidence["client-00"].threshold == HARM


def test_whoever_does_what_nothing_would_do_is_not_flagged() -> None:
    found = found_in(losses({"client-03": 1.4, "client-07": 1.4 + 4 * HARM * 0.9}))
    assert not flagged(found)
    assert found.evidence["client-03"].score == pytest.approx(0.0)


def test_a_clean_cohort_has_no_flags() -> None:
    found = found_in(losses())
    assert not flagged(found)
    assert all(evidence.score < 0 for evidence in found.evidence.values())


def test_where_the_round_or_the_typical_share_helps_nobody_it_tells_nothing() -> None:
    harm = {"client-03": 3.0}
    assert found_in(losses(harm), start=1.005).evidence["client-03"].threshold is None
    assert found_in(losses(harm), diluted=1.04).evidence["client-03"].threshold is None  # honest shares harm as well


def lying(bad: set[str], harm: float = 3.0) -> dict[str, dict[str, float]]:
    """Five colluders' updates harm; their words: honest updates ruin them, those of their own do them only good."""
    mixed = losses(dict.fromkeys(bad, harm))
    for client, row in mixed.items():
        row |= dict.fromkeys(bad, 0.0 if client in bad else 50.0)
    return mixed


def test_liars_flag_no_honest_client_and_clear_none_of_their_own() -> None:
    bad = set(NAMES[:5])
    assert flagged(found_in(lying(bad))) == bad


@pytest.mark.parametrize("kept", [0.0, 0.3])
def test_a_panel_that_colluders_would_outvote_hears_them_by_their_influence(kept: float) -> None:
    """Of a panel of five, three lie about others and about themselves; two of nine others are honest."""
    bad, panel = set(NAMES[:3]), ["client-00", "client-01", "client-02", "client-08", "client-11"]
    influence = {**EQUAL, **dict.fromkeys(bad, kept)}
    rows = [{judge: row[judge] for judge in panel} for row in (alike(5.0), alike(1.0), alike(1.4))]
    mixed = {client: {judge: row[judge] for judge in panel} for client, row in lying(bad).items()}
    found = functional_evidence(*rows, mixed, influence)
    assert flagged(found) == bad
    # Were every word worth the same, they would have had their way.
    assert flagged(functional_evidence(*rows, mixed, EQUAL)).isdisjoint(bad)


def test_one_judge_of_two_flags_nobody() -> None:
    mixed = {client: {"a": 9.0, "b": 1.0} for client in "cde"}
    one = {"a": 1.0, "b": 1.0}
    found = functional_evidence({"a": 5.0, "b": 5.0}, one, {"a": 1.4, "b": 1.4}, mixed, dict.fromkeys("abcde", 1.0))
    assert not flagged(found)


def test_nobody_judges_itself_and_who_has_no_influence_is_not_heard() -> None:
    mixed = losses()
    plain = found_in(mixed)
    boasting = {client: {**row, client: 0.0} for client, row in mixed.items()}
    assert found_in(boasting) == plain
    silent = {**EQUAL, "client-05": 0.0}
    changed = {client: {**row, "client-05": 77.0} for client, row in mixed.items()}
    assert found_in(changed, silent) == found_in(mixed, silent)


def test_the_effect_is_told_in_numbers_people_understand() -> None:
    mixed = losses()
    mixed["client-03"] = {name: 0.99 if number < 2 else 1.014 + 0.001 * number for number, name in enumerate(NAMES)}
    effect = found_in(mixed).effects["client-03"]
    assert (effect.raised, effect.judges) == (9, 11)
    assert effect.change == pytest.approx(0.014, abs=1e-3)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_breaks_is_harm(broken: float) -> None:
    found = found_in(losses({"client-03": broken}))
    assert flagged(found) == {"client-03"}
    assert found.evidence["client-03"].score <= BROKEN
    assert math.isfinite(found.effects["client-03"].change)


def test_the_order_of_clients_and_judges_does_not_matter() -> None:
    mixed = losses({"client-03": 3.0})
    turned = {client: dict(reversed(row.items())) for client, row in reversed(mixed.items())}
    forwards = functional_evidence(alike(5.0), alike(1.0), alike(1.4), mixed, EQUAL)
    rows = [dict(reversed(alike(loss).items())) for loss in (5.0, 1.0, 1.4)]
    backwards = functional_evidence(*rows, turned, dict(reversed(EQUAL.items())))
    assert forwards == backwards
    assert list(forwards.evidence) == list(backwards.evidence) == NAMES


def test_where_nobody_can_judge_nobody_is_flagged() -> None:
    found = functional_evidence({}, {}, {}, {name: {} for name in NAMES}, EQUAL)
    assert {evidence.threshold for evidence in found.evidence.values()} == {None}
    assert found.effects == {}


@pytest.mark.parametrize(
    ("items", "value"),
    [
        ([(3.0, 1.0), (1.0, 1.0), (2.0, 1.0)], 2.0),
        ([(1.0, 1.0), (2.0, 1.0)], 1.0),  # the lower one
        ([(1.0, 1.0), (2.0, 1.5)], 2.0),
        ([(1.0, 0.0), (2.0, 0.1), (9.0, 0.0)], 2.0),
        ([(1.0, 0.0), (2.0, 0.0), (9.0, 0.0)], 2.0),  # nobody has any weight
    ],
)
def test_the_weighted_median(items: list[tuple[float, float]], value: float) -> None:
    assert weighted_median(items) == value


def test_a_mixture_is_the_mean_with_a_share_of_the_update_at_the_means_rank() -> None:
    g = torch.Generator().manual_seed(0)

    def state(rank: int) -> AdapterState:
        factors = LoraFactors(torch.randn(rank, 5, generator=g), torch.randn(6, rank, generator=g), 0.5)
        return AdapterState({"m": factors}, {"head": torch.randn(3, generator=g)})

    mean, update = state(4), state(1)
    got = mixture(mean, update)
    exact = (1 - MIXED) * mean["m"].dense() + MIXED * update["m"].dense()
    torch.testing.assert_close(
        got["m"].dense(), (mean["m"] * (1 - MIXED) + update["m"] * MIXED).truncated(4)[0].dense()
    )
    assert (got["m"].dense() - exact).norm() < exact.norm()
    assert (got["m"].rank, got["m"].scale) == (4, 0.5)
    torch.testing.assert_close(got.extras["head"], (1 - MIXED) * mean.extras["head"] + MIXED * update.extras["head"])
    same = mixture(mean, mean)
    torch.testing.assert_close(same["m"].dense(), mean["m"].dense())
