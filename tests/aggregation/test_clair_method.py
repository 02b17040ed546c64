"""The method clair over a cohort: through `aggregate`, with a reference, lazily, and over rounds."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterator, Mapping

import pytest
import torch

from fedlora_hf.aggregation import aggregate
from fedlora_hf.errors import ConfigError, UpdateError
from fedlora_hf.methods import METHODS
from fedlora_hf.methods.clair import ClairOptions
from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors, state_sum

SHAPES = {"a": (24, 20), "b": (16, 20)}
K, BAD, R = 12, 4, 4


def clients(seed: int = 0, ranks: tuple[int, ...] = (R,)) -> list[ClientUpdate]:
    """Updates with a common direction and own parts in a shared output subspace; the last BAD are unrelated."""
    g = torch.Generator().manual_seed(seed)
    bases = {
        m: (torch.randn(out, 2, generator=g), torch.randn(2, width, generator=g)) for m, (out, width) in SHAPES.items()
    }
    updates = []
    for k in range(K):
        r = ranks[k % len(ranks)]
        state = {}
        for module, (out, width) in SHAPES.items():
            B, A = 0.2 * torch.randn(out, r, generator=g), torch.randn(r, width, generator=g)
            if k < K - BAD:
                B[:, :2] += bases[module][0]
                A[:2] = bases[module][1] + 0.5 * A[:2]
            state[module] = LoraFactors(A, 3 * B if k >= K - BAD else B, 2.0)
        head = {"head": torch.full((2,), float(k))}
        updates.append(ClientUpdate(f"c{k:02d}", AdapterState(state, head), 10 + k))
    return updates


BAD_IDS = tuple(f"c{k:02d}" for k in range(K - BAD, K))


@pytest.mark.parametrize("options", [{}, {"refine": "soft"}, {"solver": "convex"}, {"rank": 2}, {"center": True}])
def test_contaminated_clients_are_left_out(options: dict[str, object]) -> None:
    found = aggregate(clients(), "clair", **options)
    assert found.flagged == BAD_IDS
    assert all(found.weights[client] == 0 for client in BAD_IDS)
    assert sum(found.weights.values()) == pytest.approx(1)
    assert sorted(found.personalised) == [f"c{k:02d}" for k in range(K - BAD)]
    assert {kind for kinds in found.evidence.values() for kind in kinds} == {"subspace", "direction", "scale"}
    assert found.converged


def test_global_adapter_is_the_exact_mean_over_the_collaborative() -> None:
    found = aggregate(clients(), "clair", target_rank=20, influence="flags")
    kept = [u for u in clients() if u.client_id not in found.flagged]
    total = sum(u.num_examples or 0 for u in kept)
    for module in SHAPES:
        mean = sum((u.num_examples or 0) / total * u.state[module].dense() for u in kept)
        torch.testing.assert_close(found.state[module].dense(), mean, atol=1e-5, rtol=1e-4)
        assert found.modules[module]["discarded_energy"] < 1e-6
    heads = sum((u.num_examples or 0) / total * u.state.extras["head"] for u in kept)
    torch.testing.assert_close(found.state.extras["head"], heads)


def test_personalised_is_the_formula_and_keeps_its_own_head() -> None:
    found = aggregate(clients(), "clair", exact=True, weight_by="uniform", rank=2, influence="flags")
    kept = [u for u in clients() if u.client_id not in found.flagged]
    for module in SHAPES:
        dense = {u.client_id: u.state[module].dense(torch.float64) for u in kept}
        mean = sum(dense.values()) / len(kept)
        refined = {k: found.personalised[k][module].dense(torch.float64) for k in dense}
        # W~_k - W~_j lies in the rank-2 subspace, and the part of W~_k off it is that of the mean.
        U = torch.linalg.svd(torch.cat([W - refined["c00"] for W in refined.values()], 1))[0][:, :2]
        for k, W in dense.items():
            torch.testing.assert_close(refined[k], U @ U.T @ W + mean - U @ U.T @ mean, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.personalised["c03"].extras["head"], torch.full((2,), 3.0))


def test_personalised_has_the_target_rank_and_the_cohorts_scale() -> None:
    found = aggregate(clients(ranks=(4, 2)), "clair", target_rank=3)
    factors = found.personalised["c00"]["a"]
    assert (factors.rank, factors.scale) == (3, 2.0)


def test_refine_none_personalises_nobody() -> None:
    assert not aggregate(clients(), "clair", refine="none").personalised


def test_order_changes_no_bit() -> None:
    one, other = aggregate(clients(), "clair"), aggregate(list(reversed(clients())), "clair")
    for module in SHAPES:
        assert torch.equal(one.state[module].B, other.state[module].B)
        assert torch.equal(one.personalised["c01"][module].A, other.personalised["c01"][module].A)
    assert one.evidence == other.evidence


def test_evidence_is_on_the_change_since_the_reference() -> None:
    """A large common start would hide every client's change; the refinement acts on the whole adapter."""
    updates, start = clients(), clients(seed=9)[0].state
    start = AdapterState({module: factors * 20.0 for module, factors in start.items()}, start.extras)
    moved = [ClientUpdate(u.client_id, state_sum(start, u.state), u.num_examples) for u in updates]
    plain, found = aggregate(updates, "clair"), aggregate(moved, "clair", reference=start, target_rank=20)
    assert found.flagged == plain.flagged == BAD_IDS
    for client in plain.evidence:
        assert found.evidence[client]["direction"].score == pytest.approx(
            plain.evidence[client]["direction"].score, abs=1e-3
        )
    mean = plain.state["a"].dense() * 0 + sum(plain.weights[u.client_id] * u.state["a"].dense() for u in updates)
    torch.testing.assert_close(found.state["a"].dense() - start["a"].dense(), mean, atol=2e-3, rtol=1e-2)


def test_quarantined_clients_never_reach_the_fit() -> None:
    updates = clients()
    bad = updates[0].state["a"]
    state = {**dict(updates[0].state), "a": LoraFactors(bad.A * float("nan"), bad.B, 2.0)}
    broken = [ClientUpdate("c00", AdapterState(state, updates[0].state.extras), 10), *updates[1:]]
    found = aggregate(broken, "clair")
    assert set(found.quarantined) == {"c00"}
    assert found.flagged == BAD_IDS
    assert "c00" not in found.evidence


def test_zero_updates_are_flagged_on_scale() -> None:
    updates = clients()
    empty = AdapterState(
        {m: LoraFactors(f.A, f.B * 0, 2.0) for m, f in updates[0].state.items()}, updates[0].state.extras
    )
    found = aggregate([ClientUpdate("c00", empty, 10), *updates[1:]], "clair")
    assert found.flagged == ("c00", *BAD_IDS)
    assert found.evidence["c00"]["scale"].flagged
    assert not found.evidence["c00"]["subspace"].flagged


class Counting(Mapping[str, LoraFactors]):
    """Factors that count how often a module is read."""

    def __init__(self, factors: Mapping[str, LoraFactors]) -> None:
        self.factors, self.reads = factors, 0

    def __getitem__(self, module: str) -> LoraFactors:
        self.reads += 1
        return self.factors[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self.factors)

    def __len__(self) -> int:
        return len(self.factors)


def test_personalised_adapters_are_computed_when_asked_for() -> None:
    plain = clients()
    counted = [Counting(dict(u.state)) for u in plain]
    updates = [
        ClientUpdate(u.client_id, AdapterState(c, u.state.extras), u.num_examples)
        for u, c in zip(plain, counted, strict=True)
    ]
    found = aggregate(updates, "clair")
    before = counted[0].reads
    adapter = found.personalised["c00"]
    assert counted[0].reads == before
    assert adapter["a"].rank == R
    assert counted[0].reads == before + 1


def test_two_clients_are_refused_with_the_remedy() -> None:
    with pytest.raises(UpdateError, match="use product_mean"):
        aggregate(clients()[:2], "clair")


def test_options_are_checked_before_anything_is_computed() -> None:
    with pytest.raises(ConfigError, match="leave room"):
        aggregate(clients(), "clair", rank=17)
    with pytest.raises(ConfigError):
        aggregate(clients(), "clair", side="left")
    method = METHODS["clair"]
    assert method.options is ClairOptions
    assert (method.name, method.averages, method.robust) == ("clair", "product", True)
