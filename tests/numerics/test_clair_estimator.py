"""CLAIR on matrices and factor pairs: exact recovery, invariances, refinement's formula, bad input."""
# SPDX-License-Identifier: Apache-2.0

import warnings

import pytest
import torch
from torch import Tensor

from fedlora_hf.errors import ConfigError, ConvergenceWarning, UpdateError
from fedlora_hf.numerics.clair import Clair
from fedlora_hf.numerics.lowrank import subspace_distance

OUT, IN, RANK = 30, 24, 3


def cohort(
    K: int, seed: int = 0, common: float = 1.0, noise: float = 0.0
) -> tuple[list[Tensor], Tensor, torch.Generator]:
    g = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(normal(g, OUT, RANK))[0]
    V0 = normal(g, RANK, IN)
    return [U @ (common * V0 + normal(g, RANK, IN)) + noise * normal(g, OUT, IN) for _ in range(K)], U, g


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def contaminate(updates: list[Tensor], bad: int, kind: str, g: torch.Generator) -> list[Tensor]:
    wrong = torch.linalg.qr(normal(g, OUT, RANK))[0]
    honest = torch.stack(updates[:-bad])
    makers = {
        "gaussian": lambda W: normal(g, OUT, IN) * W.norm() / (OUT * IN) ** 0.5,
        "own": lambda W: torch.linalg.qr(normal(g, OUT, RANK))[0] @ normal(g, RANK, IN),
        "colluding": lambda W: wrong @ normal(g, RANK, IN),
        "coherent": lambda W: 5 * wrong[:, :1] @ torch.ones(1, IN, dtype=W.dtype),
        "boost": lambda W: 10 * W,
        "zero": lambda W: 0 * W,
        "flip": lambda W: -W,
        "little": lambda W: honest.mean(0) - 1.5 * honest.std(0),
    }
    return updates[:-bad] + [makers[kind](W) for W in updates[-bad:]]


@pytest.mark.parametrize("kind", ["gaussian", "own", "colluding", "coherent", "boost", "zero", "flip", "little"])
@pytest.mark.parametrize(("K", "bad"), [(11, 4), (20, 9)])
def test_noiseless_recovery_is_exact(kind: str, K: int, bad: int) -> None:
    clean, U, g = cohort(K)
    found = Clair().fit(contaminate(clean, bad, kind, g))
    assert found.flagged == tuple(str(k) for k in range(K - bad, K))
    assert found.rank["W"] == RANK
    assert subspace_distance(U, found.subspace["W"]) < 1e-6
    assert all(found.weights[k] == 0 and found.shares[k] == 0 for k in found.flagged)


@pytest.mark.parametrize("kind", ["gaussian", "own", "colluding", "boost", "zero"])
def test_no_common_direction_is_needed(kind: str) -> None:
    """The paper's own model: V_k of mean zero."""
    clean, U, g = cohort(20, common=0.0)
    found = Clair().fit(contaminate(clean, 9, kind, g))
    assert found.flagged == tuple(str(k) for k in range(11, 20))
    assert subspace_distance(U, found.subspace["W"]) < 1e-6
    if kind != "zero":
        assert not found.diagnosis["direction_usable"]
        assert found.evidence["0"]["direction"].threshold is None


def test_both_solvers_agree_where_both_identify() -> None:
    clean, _, g = cohort(20, noise=0.02)
    updates = contaminate(clean, 6, "own", g)
    one, other = Clair(rank=RANK).fit(updates), Clair(rank=RANK, solver="convex").fit(updates)
    assert one.flagged == other.flagged == tuple(str(k) for k in range(14, 20))
    assert subspace_distance(one.subspace["W"], other.subspace["W"]) < 0.02
    assert other.converged


def test_error_grows_linearly_in_noise() -> None:
    errors = []
    for noise in (0.001, 0.01, 0.1):
        clean, U, g = cohort(16, noise=noise)
        errors.append(subspace_distance(U, Clair(rank=RANK).fit(contaminate(clean, 5, "own", g)).subspace["W"]))
    assert errors[1] / errors[0] == pytest.approx(10, rel=0.3)
    assert errors[2] / errors[1] == pytest.approx(10, rel=0.3)


@pytest.mark.parametrize("K", [8, 30])
@pytest.mark.parametrize(("common", "noise"), [(0.0, 0.1), (1.0, 0.5), (1.0, 1.0)])
def test_clean_cohorts_are_left_alone(K: int, common: float, noise: float) -> None:
    flags = sum(len(Clair(refine="none").fit(cohort(K, seed, common, noise)[0]).flagged) for seed in range(4))
    assert flags == 0


@pytest.mark.parametrize("seed", range(4))
def test_nothing_shared_is_said_and_only_size_is_judged(seed: int) -> None:
    """And no warning of a solver that does not settle: there is nothing to settle on."""
    g = torch.Generator().manual_seed(seed)
    updates = [normal(g, OUT, 1) @ normal(g, 1, IN) for _ in range(12)]
    updates[3] *= 30 * updates[0].norm() / updates[3].norm()
    found = Clair().fit(updates)
    assert found.diagnosis["identifiable"] is False
    assert "common structure: none" in str(found.diagnosis["summary"])
    assert found.flagged == ("3",)
    assert found.evidence["0"]["subspace"].threshold is None


def groups(sizes: list[int], common: float, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Clients of several groups, each with an update of its own of unit norm, beside a common one; a little noise."""
    g = torch.Generator().manual_seed(seed)
    shared, *own = [normal(g, OUT, 2) @ normal(g, 2, IN) for _ in range(1 + len(sizes))]
    updates = [
        common * shared / shared.norm() + W / W.norm() + 0.3 * normal(g, OUT, IN) / (OUT * IN) ** 0.5
        for W, size in zip(own, sizes, strict=True)
        for _ in range(size)
    ]
    return updates, shared / shared.norm()


@pytest.mark.parametrize("sizes", [[5, 3], [12, 5, 3], [30, 20]])
def test_an_honest_minority_is_not_flagged_for_being_different(sizes: list[int]) -> None:
    """Groups that have half of their energy in common, and nothing of what the majority has besides."""
    for seed in range(3):
        assert Clair(refine="none").fit(groups(sizes, 1.0, seed)[0]).flagged == ()


def test_a_group_that_shares_nothing_with_the_majority_is_flagged_and_said_to_agree() -> None:
    found = Clair(refine="none").fit(groups([12, 8], 0.0)[0])
    assert found.flagged == tuple(str(k) for k in range(12, 20))
    assert found.diagnosis["flagged_agree"] is True
    assert "collude, or are honest" in str(found.diagnosis["summary"])
    unrelated = contaminate(groups([20], 0.0)[0], 8, "own", torch.Generator().manual_seed(1))
    found = Clair(refine="none").fit(unrelated)
    assert found.flagged == tuple(str(k) for k in range(12, 20))
    assert found.diagnosis["flagged_agree"] is False


def test_a_majority_that_points_against_itself_judges_nobody() -> None:
    """Five of eight hold one task, two of these with the sign flipped: no reason to flag the three others."""
    updates = groups([5, 3], 0.3)[0]
    updates[3:5] = [-W for W in updates[3:5]]
    found = Clair(refine="none").fit(updates)
    assert found.diagnosis["opposed_majority"] is True
    assert "point against each other" in str(found.diagnosis["summary"])
    assert found.flagged == ()


def test_a_kind_overruled_keeps_a_threshold() -> None:
    """So that a round in which one kind spoke for a client counts when rounds are combined."""
    updates = groups([12, 8], 1.0)[0]
    evidence = Clair(refine="none").fit(updates).evidence["19"]
    assert evidence["direction"].threshold is not None
    assert evidence["direction"].score < evidence["direction"].threshold
    assert evidence["subspace"].threshold is not None
    assert evidence["subspace"].score < evidence["subspace"].threshold


def test_few_clients_are_called_weak_evidence() -> None:
    found = Clair().fit(cohort(4)[0])
    assert found.diagnosis["weak_evidence"] is True
    assert "weak" in str(found.diagnosis["summary"])


def test_refinement_is_the_formula() -> None:
    clean, _, g = cohort(10, noise=0.1)
    updates = contaminate(clean, 3, "own", g)
    found = Clair(rank=2, exact=True, influence="flags").fit(updates, weights=range(1, 11))
    U = found.subspace["W"]
    kept = [k for k in range(10) if str(k) in found.collaborative]
    mean = sum((k + 1) * updates[k] for k in kept) / sum(k + 1 for k in kept)
    for k in kept:
        torch.testing.assert_close(found.matrix(str(k)), U @ U.T @ updates[k] + mean - U @ U.T @ mean)
    torch.testing.assert_close(found.matrix(), mean)


def test_soft_refinement_lies_between_the_mean_and_the_client() -> None:
    clean, _, _ = cohort(20, common=1.0, noise=0.4)
    true = cohort(20, common=1.0)[0]
    found = Clair(refine="soft").fit(clean)
    mean = torch.stack(clean).mean(0)
    soft = sum(float((found.matrix(str(k)) - W).square().sum()) for k, W in enumerate(true))
    assert soft < sum(float((W - V).square().sum()) for V, W in zip(clean, true, strict=True))
    assert soft < sum(float((mean - W).square().sum()) for W in true)


def test_full_rank_is_local() -> None:
    clean = cohort(8, noise=0.1)[0]
    found = Clair(rank=IN, side="input").fit(clean)
    torch.testing.assert_close(found.matrix("0"), clean[0])


def test_input_side_is_the_output_side_of_the_transposed() -> None:
    clean, _, g = cohort(12, noise=0.1)
    updates = contaminate(clean, 4, "own", g)
    one, other = Clair(side="output").fit(updates), Clair(side="input").fit([W.T for W in updates])
    assert one.flagged == other.flagged
    torch.testing.assert_close(one.subspace["W"], other.subspace["W"])
    torch.testing.assert_close(one.matrix("0"), other.matrix("0").T)


def test_factors_and_matrices_give_the_same() -> None:
    clean, _, g = cohort(12)
    updates = contaminate(clean, 4, "own", g)
    pairs = []
    for W in updates:
        left, values, right = torch.linalg.svd(W, full_matrices=False)
        mix = normal(g, RANK, RANK)  # another gauge for every client
        pairs.append((left[:, :RANK] * values[:RANK] @ mix, torch.linalg.inv(mix) @ right[:RANK]))
    one, other = Clair().fit(updates), Clair().fit(pairs)
    assert one.flagged == other.flagged
    assert subspace_distance(one.subspace["W"], other.subspace["W"]) < 1e-8
    torch.testing.assert_close(one.matrix("0"), other.matrix("0"))


def test_order_of_named_clients_changes_no_bit() -> None:
    clean, _, g = cohort(12, noise=0.3)
    updates = contaminate(clean, 4, "own", g)
    ids = [f"c{k:02d}" for k in range(12)]
    turn = [7, 3, 11, 0, 1, 2, 10, 9, 8, 4, 5, 6]
    one = Clair().fit(updates, ids=ids)
    other = Clair().fit([updates[k] for k in turn], ids=[ids[k] for k in turn])
    assert torch.equal(one.subspace["W"], other.subspace["W"])
    assert torch.equal(one.matrix("c00"), other.matrix("c00"))
    assert one.evidence == dict(sorted(other.evidence.items()))


def test_size_of_a_client_does_not_turn_the_subspace() -> None:
    clean = cohort(12, noise=0.3)[0]
    sizes = [1.0 + 0.1 * k for k in range(12)]
    one, other = Clair(rank=RANK).fit(clean), Clair(rank=RANK).fit([s * W for s, W in zip(sizes, clean, strict=True)])
    assert subspace_distance(one.subspace["W"], other.subspace["W"]) < 1e-10


def test_common_component_is_taken_out_on_request() -> None:
    """A component common to all, outside U, hides U from an uncentred fit of the right rank, not from a centred one."""
    clean, U, g = cohort(20, common=0.0, noise=0.02)
    everywhere = 20 * normal(g, OUT, 1) @ normal(g, 1, IN)
    found = Clair(rank=RANK, center=True).fit([W + everywhere for W in clean])
    assert subspace_distance(U, found.subspace["W"]) < 0.05
    assert subspace_distance(U, Clair(rank=RANK).fit([W + everywhere for W in clean]).subspace["W"]) > 0.5


def test_one_weight_for_all_modules() -> None:
    """A client wrong in one module and right in the others is wrong or right as a whole; modules are reported apart."""
    a, _, g = cohort(12, 0)
    b = cohort(12, 1)[0]
    found = Clair().fit({"a": contaminate(a, 4, "own", g), "b": contaminate(b, 4, "own", g)})
    assert found.flagged == ("8", "9", "10", "11")
    assert set(found.module_evidence) == set(found.rank) == {"a", "b"}
    assert found.module_evidence["a"]["11"]["subspace"] > 0.5 > found.module_evidence["a"]["0"]["subspace"]


def test_copies_are_reported_and_not_flagged() -> None:
    clean = cohort(10, noise=0.3)[0]
    clean[7] = clean[2].clone()
    found = Clair(influence="flags").fit(clean)
    assert found.diagnosis["copies"] == [["2", "7"]]
    assert found.flagged == ()
    once = torch.stack([W * (0.5 if k in (2, 7) else 1.0) for k, W in enumerate(clean)]).sum(0) / 9
    torch.testing.assert_close(found.matrix(), once)


def test_a_weak_common_direction_is_used_where_it_is_far_beyond_chance() -> None:
    """At an agreement of 0.09, where chance gives 0.01, sign flips are found; at 0.05, as clients with one task
    each may, nobody is judged by it."""
    g = torch.Generator().manual_seed(5)

    def unit() -> torch.Tensor:
        W = torch.randn(96, 64, generator=g, dtype=torch.float64)
        return W / W.norm()

    common = unit()
    for share, usable in ((0.095, True), (0.05, False)):
        updates = [share**0.5 * common + (1 - share) ** 0.5 * unit() for _ in range(20)]
        updates[18:] = [-updates[18], -updates[19]]
        found = Clair(refine="none").fit(updates)
        assert 0.8 * share < found.diagnosis["agreement"] < 0.1
        assert found.diagnosis["direction_usable"] == usable
        assert found.flagged == (("18", "19") if usable else ())


def test_all_zero_updates_are_no_crash() -> None:
    found = Clair().fit([torch.zeros(OUT, IN)] * 4)
    assert found.flagged == ()
    assert float(found.matrix().norm()) == 0
    assert bool(torch.isfinite(found.matrix("0")).all())


def test_most_extreme_sizes_stay_finite() -> None:
    clean = cohort(10)[0]
    clean[0], clean[1] = clean[0] * 1e-30, clean[1] * 1e12
    found = Clair().fit(clean)
    assert found.flagged == ("0", "1")
    for kinds in found.evidence.values():
        assert all(score.score == score.score and abs(score.score) < 1e6 for score in kinds.values())


@pytest.mark.parametrize(
    ("updates", "text"),
    [
        ([torch.ones(3, 2)] * 2, "at least 3"),
        ([torch.ones(3, 2), torch.ones(3, 2), torch.ones(2, 3)], "shapes"),
        ([torch.ones(3, 2), torch.ones(3, 2), torch.full((3, 2), float("nan"))], "client 2 has NaN or Inf"),
        ([torch.ones(3)] * 3, "shape"),
        ([(torch.ones(3, 2), torch.ones(1, 4))] * 3, "pass"),
        ({"a": [torch.ones(3, 2)] * 3, "b": [torch.ones(3, 2)] * 4}, "same"),
    ],
)
def test_bad_updates_are_typed_errors(updates: object, text: str) -> None:
    with pytest.raises(UpdateError, match=text):
        Clair().fit(updates)  # type: ignore[arg-type]


def test_bad_arguments_are_typed_errors() -> None:
    clean = cohort(4)[0]
    with pytest.raises(UpdateError, match="ids"):
        Clair().fit(clean, ids=["a", "a", "b", "c"])
    with pytest.raises(UpdateError, match="weights"):
        Clair().fit(clean, weights=[0, 0, 0, 0])
    with pytest.raises(ConfigError, match="leave room for 30"):
        Clair(rank=31).fit(clean)
    wrong: list[dict[str, object]] = [{"influence": "some"}, {"clip": 0}, {"clip": float("nan")}]
    for options in (
        *wrong,
        {"side": "top"},
        {"solver": "lp"},
        {"refine": "hardest"},
        {"rank": 0},
        {"rank": "all"},
        {"tol": 0},
    ):
        with pytest.raises(ConfigError):
            Clair(**options)  # type: ignore[arg-type]


def test_stopping_early_is_said() -> None:
    clean, _, g = cohort(12, noise=0.5)
    with pytest.warns(ConvergenceWarning, match="raise max_iter"):
        found = Clair(max_iter=1).fit(contaminate(clean, 4, "own", g))
    assert not found.converged
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Clair().fit(clean).converged
