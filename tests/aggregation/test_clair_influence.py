"""Influence through the door: what the record gets, the start under clipped changes, and clients that turn."""
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from fedlora_hf.aggregation import aggregate
from fedlora_hf.numerics.clair.influence import HARMED, UNHARMED, trust
from fedlora_hf.numerics.evidence import Evidence
from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors, state_sum

K, R, OUT, IN = 10, 4, 24, 20


def clients(large: float = 1.0) -> list[ClientUpdate]:
    """Updates with a common direction; the last one is `large` times as long."""
    g = torch.Generator().manual_seed(0)
    common = torch.randn(OUT, 2, generator=g), torch.randn(2, IN, generator=g)
    updates = []
    for k in range(K):
        B, A = 0.3 * torch.randn(OUT, R, generator=g), torch.randn(R, IN, generator=g)
        B[:, :2] += common[0]
        A[:2] = common[1] + 0.3 * A[:2]
        B = large * B if k == K - 1 else B
        updates.append(ClientUpdate(f"c{k}", AdapterState({"m": LoraFactors(A, B, 2.0)}), 10 + k))
    return updates


@pytest.mark.parametrize("refine", ["hard", "soft"])
def test_the_change_is_clipped_and_not_the_start(refine: str) -> None:
    """From a start far from 0 the same changes end at that start plus their own clipped mean."""
    updates = clients(3.0)
    start = AdapterState({"m": LoraFactors(torch.randn(6, IN), torch.randn(OUT, 6), 1.5)})
    moved = [ClientUpdate(u.client_id, state_sum(start, u.state), u.num_examples) for u in updates]
    plain = aggregate(updates, "clair", target_rank=20, refine=refine)
    found = aggregate(moved, "clair", target_rank=20, refine=refine, reference=start, exact=True)
    assert plain.influence["c9"] < 0.6
    assert found.influence == pytest.approx(plain.influence, abs=1e-4)
    torch.testing.assert_close(
        found.state["m"].dense(), start["m"].dense() + plain.state["m"].dense(), atol=1e-3, rtol=0
    )
    norms = torch.tensor([u.state.norm() for u in updates])
    clip = (1.5 * norms.median() / norms).clamp_max(1.0)
    mean = sum(plain.weights[u.client_id] * float(c) * u.state["m"].dense() for u, c in zip(updates, clip, strict=True))
    torch.testing.assert_close(plain.state["m"].dense(), mean, atol=1e-4, rtol=1e-3)
    assert sorted(found.personalised) == [u.client_id for u in updates]
    own = found.personalised["c9"]["m"].dense()
    assert bool(torch.isfinite(own).all())


def test_weights_and_influence_are_told_of_every_client() -> None:
    found = aggregate(clients(3.0), "clair")
    assert sum(found.weights.values()) == pytest.approx(1)
    assert list(found.influence) == list(found.weights)
    assert all(0 <= kept <= 1 for kept in found.influence.values())
    assert aggregate(clients(), "product_mean").influence == {}


def test_the_plain_rule_and_another_clip_can_be_chosen() -> None:
    assert set(aggregate(clients(3.0), "clair", influence="flags").influence.values()) == {1.0}
    wide, narrow = (aggregate(clients(3.0), "clair", clip=clip).influence["c9"] for clip in (10.0, 1.0))
    assert wide > 0.9 > 2 * narrow


def heard(**scores: float) -> dict[str, Evidence]:
    """Functional evidence on c0 to c9, whose line is at 0.3: what is said, else that a share helps a little."""
    return {f"c{k}": Evidence(scores.get(f"c{k}", -0.05), 0.3) for k in range(K)}


def test_who_harms_others_counts_for_less_long_before_a_flag() -> None:
    updates = clients()
    plain = aggregate(updates, "clair")
    found = aggregate(updates, "clair", functional=heard(c1=0.09, c2=0.2))
    assert found.flagged == ()
    assert found.influence["c1"] == pytest.approx(plain.influence["c1"] / 2)  # half-way from UNHARMED to HARMED
    assert found.influence["c2"] == found.weights["c2"] == 0
    assert found.influence["c0"] == plain.influence["c0"]
    assert set(found.suspicious) == {"c2"}
    assert "c2" in found.personalised
    flagged = aggregate(updates, "clair", functional=heard(c2=0.31))
    assert flagged.flagged == ("c2",)


def test_where_nobody_harms_and_where_it_tells_nothing_not_a_bit_moves() -> None:
    updates = clients()
    plain = aggregate(updates, "clair")
    silent = {client: Evidence(9.0, None) for client in heard()}
    for functional in (heard(), heard(c3=UNHARMED * 0.3), silent):
        found = aggregate(updates, "clair", functional=functional)
        assert torch.equal(found.state["m"].A, plain.state["m"].A)
        assert torch.equal(found.state["m"].B, plain.state["m"].B)


def test_under_the_plain_rule_who_harms_counts_in_full_up_to_the_flag() -> None:
    updates = clients()
    assert aggregate(updates, "clair", influence="flags", functional=heard(c2=0.29)).influence["c2"] == 1
    assert aggregate(updates, "clair", influence="flags", functional=heard(c2=0.31)).influence["c2"] == 0


@pytest.mark.parametrize(
    ("score", "left"), [(-3.0, 1.0), (UNHARMED, 1.0), ((UNHARMED + HARMED) / 2, 0.5), (HARMED, 0.0), (9.0, 0.0)]
)
def test_what_functional_evidence_leaves(score: float, left: float) -> None:
    assert trust(score, 1.0) == pytest.approx(left, abs=1e-12)
    assert trust(score, None) == 1.0
