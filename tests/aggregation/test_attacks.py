"""The catalogue of attacks: what each promises of what it sends, from planted honest clients."""
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from fedlora_hf.aggregation import aggregate
from fedlora_hf.aggregation.attacks import (
    ATTACKS,
    AWAKE,
    LARGE,
    Known,
    attacked,
    backdoor,
    combination,
    inner,
    norm,
    trigger,
    unit,
)
from fedlora_hf.errors import ConfigError
from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors, state_sum

SHAPES, RANK, K, BAD = {"a": (20, 16), "b": (12, 16)}, 4, 10, 3


def state(g: torch.Generator, common: dict[str, LoraFactors] | None, own: float) -> AdapterState:
    """A common part of rank 2 and an own one of rank 2."""
    factors = {}
    for name, (out, width) in SHAPES.items():
        A, B = torch.randn(RANK, width, generator=g), own * torch.randn(out, RANK, generator=g)
        if common is not None:
            A[:2], B[:, :2] = common[name].A, common[name].B
        factors[name] = LoraFactors(A, B, 0.5)
    return AdapterState(factors)


def known(seed: int = 0, start: AdapterState | None = None, number: int = 1) -> Known:
    g = torch.Generator().manual_seed(seed)
    common = {
        name: LoraFactors(torch.randn(2, width, generator=g), torch.randn(out, 2, generator=g))
        for name, (out, width) in SHAPES.items()
    }
    states = [state(g, common, 0.5) for _ in range(K)]
    wrong = state(g, None, 1.0)
    if start is not None:
        states, wrong = [state_sum(start, s) for s in states], state_sum(start, wrong)
    named = {f"c{k}": s for k, s in enumerate(states)}
    return Known(
        dict(list(named.items())[BAD:]),
        dict(list(named.items())[:BAD]),
        wrong,
        start,
        seed=seed,
        round=number,
        rule=lambda sent: aggregate([ClientUpdate(n, s) for n, s in sent.items()], "clair", reference=start).state,
    )


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "white-box"])
def test_everything_sent_is_an_adapter_that_could_have_been_trained(name: str) -> None:
    facts = known(number=AWAKE)
    sent = attacked(name, facts)
    assert list(sent) == list(facts.own)
    for client, adapter in sent.items():
        for module in SHAPES:
            assert adapter[module].shape == SHAPES[module]
            assert (adapter[module].rank, adapter[module].scale) == (RANK, 0.5)
            assert bool(torch.isfinite(adapter[module].dense()).all())
        assert norm(facts.change(adapter)) < 20 * facts.size
        assert torch.equal(attacked(name, facts)[client]["a"].B, adapter["a"].B)


@pytest.mark.parametrize("name", ["min-max", "min-sum"])
def test_distances_stay_within_those_of_the_honest(name: str) -> None:
    facts = known()
    among = torch.tensor([[norm(combination([(1, a), (-1, b)])) for b in facts.others] for a in facts.others])
    for adapter in attacked(name, facts).values():
        off = torch.tensor([norm(combination([(1, facts.change(adapter)), (-1, other)])) for other in facts.others])
        # What is sent has the clients' rank, and noise of its own: a twentieth of the norm.
        slack = 0.15 * facts.size
        if name == "min-max":
            assert 0.7 * among.max() < off.max() < among.max() + slack
        else:
            assert off.square().sum() < (among.square().sum(1).max().sqrt() + slack * len(off) ** 0.5) ** 2


@pytest.mark.parametrize(("name", "size"), [("near-line", 1.0), ("near-line-large", LARGE)])
def test_near_the_line_is_near_the_line(name: str, size: float) -> None:
    """Not flagged, at the size asked for, and most of it in the wrong direction."""
    facts = known()
    sent = attacked(name, facts)
    assert norm(facts.change(sent["c0"])) == pytest.approx(size * facts.size, rel=0.05)
    updates = [ClientUpdate(n, s) for n, s in {**facts.honest, **sent}.items()]
    found = aggregate(updates, "clair", influence="flags")
    assert not any(found.evidence[client][kind].flagged for client in sent for kind in ("direction", "subspace"))
    assert 0.6 < found.evidence["c0"]["direction"].score < 0.85


def test_mixed_and_slow_drift_are_shares_of_the_wrong_change() -> None:
    facts = known(number=4)
    sent = facts.change(attacked("slow-drift", facts)["c1"])
    half = combination([(0.5, facts.change(facts.own["c1"])), (0.5, facts.aim)])
    best = {name: part.truncated(RANK)[0] for name, part in half.items()}
    assert norm(combination([(1, sent), (-1, best)])) < 1e-4 * norm(best)
    share = norm(combination([(1, facts.change(attacked("mixed", facts)["c1"])), (-1, facts.change(facts.own["c1"]))]))
    assert share < norm(combination([(1, sent), (-1, facts.change(facts.own["c1"]))]))


def test_the_backdoor_is_of_rank_one_and_of_the_size_asked_for() -> None:
    facts = known()
    hidden = trigger(facts)
    assert all(torch.linalg.matrix_rank(part.dense()) == 1 for part in hidden.values())
    small, large = (inner(facts.change(backdoor(facts, size)["c0"]), hidden) for size in (1.0, 4.0))
    assert large - small == pytest.approx(3 * facts.size, rel=0.1)


def test_split_attackers_hold_the_whole_wrong_change_between_them() -> None:
    facts = known()
    sent = attacked("split", facts)
    wrong = {
        name: [client for client, adapter in sent.items() if _along(adapter[name], facts.aim[name]) > 0.9]
        for name in SHAPES
    }
    assert wrong == {"a": ["c0"], "b": ["c1"]}


def _along(part: LoraFactors, aim: LoraFactors) -> float:
    return inner(unit({"m": part}), unit({"m": aim}))


def test_sleepers_are_honest_first() -> None:
    facts = known(number=AWAKE - 1)
    assert attacked("sleepers", facts) == dict(facts.own)
    awake = known(number=AWAKE)
    assert norm(awake.change(attacked("sleepers", awake)["c0"])) == pytest.approx(LARGE * awake.size, rel=0.05)


def test_one_module_leaves_the_others_honest() -> None:
    facts = known()
    sent = attacked("one-module", facts)
    differ = [
        name for name in SHAPES if float((sent["c0"][name].dense() - facts.own["c0"][name].dense()).norm()) > 1e-3
    ]
    assert len(differ) == 1


def test_white_box_moves_the_rule_at_least_as_far_as_what_it_starts_from() -> None:
    facts = known()
    assert facts.rule is not None
    wrong = unit(combination([(1, facts.aim), (-inner(facts.aim, unit(facts.mean)), unit(facts.mean))]))
    rule = facts.rule
    reached, plain = (
        inner(rule({**facts.honest, **attacked(name, facts)}), wrong) for name in ("white-box", "near-line")
    )
    assert reached >= 0.95 * plain


def test_changes_are_since_the_start() -> None:
    """From a start that all share the same changes are sent on top of it."""
    g = torch.Generator().manual_seed(9)
    start = AdapterState(
        {
            name: LoraFactors(torch.randn(1, width, generator=g), torch.randn(out, 1, generator=g))
            for name, (out, width) in SHAPES.items()
        }
    )
    plain, moved = known(), known(start=start)
    assert moved.size == pytest.approx(plain.size, rel=1e-4)
    assert moved.others[0]["a"].dense().sub(plain.others[0]["a"].dense()).abs().max() < 1e-4
    sent = attacked("mixed", moved)["c0"]["a"].dense() - start["a"].dense()
    assert float((sent - attacked("mixed", plain)["c0"]["a"].dense()).norm()) < 0.5 * float(sent.norm())


def test_what_cannot_be_attacked_is_said() -> None:
    facts = known()
    with pytest.raises(ConfigError, match="must be one of min-max"):
        attacked("minmax", facts)
    with pytest.raises(ConfigError, match="0 honest clients and 3 attackers"):
        attacked("mixed", Known({}, facts.own))
    with pytest.raises(ConfigError, match="without a rule"):
        attacked("white-box", Known(facts.honest, facts.own))
