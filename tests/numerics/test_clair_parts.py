"""The parts of CLAIR: blocks and leave-one-out against dense matrices, consensus, thresholds, rounds."""
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from torch import Tensor

from fedlora_hf.numerics.clair import accumulate, admm, blocks, refine
from fedlora_hf.numerics.clair.consensus import consensus, counted_once, independent, opposition, ratings, typical
from fedlora_hf.numerics.clair.flagging import critical_z, scale_scores, shorth, stranger_threshold
from fedlora_hf.numerics.clair.subspace import held_out_energies, judging_rank, shared_rank


def stacks(
    K: int, out: int, r: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(K, out, r, generator=g, dtype=dtype), torch.randn(K, r, width, generator=g, dtype=dtype)


@pytest.mark.parametrize(("out", "r", "width"), [(12, 3, 9), (250, 2, 20), (9, 9, 12), (6, 8, 30)])
def test_blocks_hold_what_the_products_have(out: int, r: int, width: int) -> None:
    B, A = stacks(6, out, r, width)
    W = B @ A
    found, inner, _ = blocks.summarise(B, A)
    torch.testing.assert_close(found.energy, W.square().sum((1, 2)))
    torch.testing.assert_close(inner, torch.einsum("jab,kab->jk", W, W))
    basis = torch.eye(out, dtype=W.dtype) if found.basis is None else found.basis
    assert found.grams is None  # a small layer's basis is formed at once
    rebuilt = basis @ found.coords
    unit = W / W.flatten(1).norm(dim=1)[:, None, None]
    torch.testing.assert_close(rebuilt @ rebuilt.mT, unit @ unit.mT)


def basis_of(found: blocks.Blocks, B: Tensor) -> Tensor:
    """The basis of a large layer, which is kept as what the factors are multiplied with."""
    assert found.basis is None
    assert found.inward is not None
    return blocks.flat(B) @ found.inward


def test_both_compressed_bases_find_the_shared_directions() -> None:
    """Above WIDTH stacked ranks the basis is cut: from the Gram, or, for many clients, by a randomised range."""
    K, out, r = 60, 300, 8
    B, A = stacks(K, out, r, 40, dtype=torch.float32)
    B[:, :, 0] += 200 * torch.nn.functional.normalize(torch.ones(out), dim=0)
    found, inner, _ = blocks.summarise(B, A)
    basis = basis_of(found, B)
    assert basis.shape == (out, blocks.WIDTH)
    ones = torch.nn.functional.normalize(torch.ones(out), dim=0)
    assert float((basis.T @ ones).norm()) > 0.999
    linear = blocks._range_basis(blocks.flat(B), blocks.WIDTH_MANY)
    assert float((linear.T @ ones).norm()) > 0.999
    assert float(inner.diag().min()) > 0


def test_coordinates_from_the_gram_are_projections_on_an_orthonormal_basis() -> None:
    K, out, r = 60, 300, 8
    B, A = stacks(K, out, r, 40, dtype=torch.float32)
    found = blocks.summarise(B, A)[0]
    basis = basis_of(found, B)
    torch.testing.assert_close(basis, blocks.summarise(B, A, keep=False)[0].basis)
    torch.testing.assert_close(basis.T @ basis, torch.eye(blocks.WIDTH), atol=1e-4, rtol=0)
    X = B @ blocks.roots(A)
    energy = X.double().square().sum((1, 2))
    torch.testing.assert_close(found.energy, energy, atol=0, rtol=1e-5)
    projected = basis.T @ (X / energy.sqrt().float()[:, None, None])
    torch.testing.assert_close(found.coords, projected, atol=1e-4, rtol=0)


def test_sketched_cosines_are_near_the_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    B, A = stacks(10, 400, 4, 300)
    A[1], B[1] = A[0], B[0]
    exact = blocks.inner_products(B, A, None)
    monkeypatch.setattr(blocks, "GRAM_LIMIT", 1)
    rough = blocks.inner_products(B, A, None)
    scale = exact.diag().sqrt()
    assert float(((rough - exact) / (scale[:, None] * scale)).square().mean().sqrt()) < 0.05


def test_held_out_energy_is_that_of_the_others_subspace() -> None:
    B, A = stacks(7, 16, 3, 10)
    found = blocks.summarise(B, A)[0]
    weights = torch.tensor([1.0, 0.5, 0.2, 1e-7, 0.9, 0.3, 0.7], dtype=torch.float64)
    energies = held_out_energies(found.coords, weights, 4)
    for k in range(7):
        others = [weights[j] * found.coords[j] @ found.coords[j].T for j in range(7) if j != k]
        U = torch.linalg.eigh(sum(others))[1][:, -4:].flip(1)
        torch.testing.assert_close(energies[k], (U.T @ found.coords[k]).square().sum(1), atol=1e-5, rtol=1e-5)


def test_ranks_from_held_out_energy() -> None:
    energy = torch.tensor([[0.5, 0.3, 0.15, 0.001, 0.001]] * 6)
    assert shared_rank(energy, out=100) == 3
    assert judging_rank(energy, out=100) == 2
    assert shared_rank(torch.full((6, 5), 0.01), out=100) == 1


def test_a_coherent_minority_is_not_the_core() -> None:
    """Four of ten agree perfectly, six a little: the six are a majority, the four are not."""
    cosine = torch.full((10, 10), 0.3, dtype=torch.float64)
    cosine[6:, 6:] = 1.0
    cosine[6:, :6] = cosine[:6, 6:] = 0.0
    cosine.fill_diagonal_(1.0)
    found = consensus(cosine)
    assert found.core.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.agreement == pytest.approx(0.3)
    assert float(ratings(cosine)[6:].max()) == 0
    assert found.to_core[:6].tolist() == pytest.approx([0.3] * 6)


def test_copies_count_once_and_vouch_for_nothing_unless_they_are_the_majority() -> None:
    similarity = torch.full((7, 7), 0.3, dtype=torch.float64).fill_diagonal_(1)
    assert counted_once(similarity).tolist() == [1] * 7
    torch.testing.assert_close(independent(similarity), similarity)
    similarity[4:, 4:] = 1
    torch.testing.assert_close(counted_once(similarity), torch.tensor([1, 1, 1, 1] + [1 / 3] * 3, dtype=torch.float64))
    assert independent(similarity)[4, 5] == 0 < independent(similarity)[4, 1]
    assert consensus(independent(similarity)).core.tolist() == [0, 1, 2, 3]
    similarity[3:, 3:] = 1
    assert counted_once(similarity).tolist() == [1] * 7
    torch.testing.assert_close(independent(similarity), similarity)


def test_shorth_ignores_the_worse_half() -> None:
    x = torch.cat([torch.linspace(-1, 1, 12), torch.full((9,), 50.0)])
    centre, spread = shorth(x)
    assert abs(centre) <= 0.1
    assert spread < 2


def test_an_unrelated_client_has_next_to_nothing_or_no_more_than_chance() -> None:
    scores = torch.linspace(-0.01, 0.01, 20)
    assert stranger_threshold(scores, torch.zeros(20))[0] == pytest.approx(0.85)
    assert stranger_threshold(scores, torch.full((20,), 0.08))[0] == pytest.approx(0.76)
    assert stranger_threshold(10 * scores, torch.zeros(20))[0] == pytest.approx(0.85)  # however wide others spread
    assert (
        float(stranger_threshold(scores, torch.full((20,), 0.2))[0]) > 1
    )  # unrelated and like the core cannot be told apart
    assert critical_z(8) > critical_z(100) > 3


def test_opposition_is_that_of_chance_unless_members_point_against_each_other() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(60, 400, generator=g, dtype=torch.float64), dim=1)
    everyone = torch.arange(60)
    assert opposition(x @ x.T, everyone) == pytest.approx(typical(x @ x.T), rel=0.1)
    same = torch.ones(60, 60, dtype=torch.float64)
    assert opposition(same, everyone) == 0
    same[:20, 20:] = same[20:, :20] = -1
    assert opposition(same, everyone) > 0.9
    assert opposition(same, torch.arange(20, 60)) == 0


def test_scale_knows_large_small_and_nothing() -> None:
    log_norm = torch.tensor([0.0, 0.1, -0.1, 0.05, -0.05, 2.3, -6.0, -700.0], dtype=torch.float64)
    alive = torch.tensor([True] * 7 + [False])
    scores, limit = scale_scores(log_norm, alive)
    assert (scores > limit).tolist() == [False] * 5 + [True] * 3
    assert bool(torch.isfinite(scores).all())


def test_evidence_over_rounds() -> None:
    quiet, loud, mute = (0.2, 0.8), (1.6, 0.8), (5.0, None)
    rounds = [{"a": {"direction": quiet}, "b": {"direction": loud}, "c": {"direction": mute}}] * 3
    rounds += [{"a": {"direction": (80.0, 0.8)}}]
    found = accumulate(rounds)
    assert found["b"]["direction"] == (2.0, 1.0)
    assert found["c"]["direction"].threshold is None
    assert not found["c"]["direction"].flagged
    assert found["a"]["direction"].score == pytest.approx((3 * 0.25 + 4) / 4)
    assert accumulate(rounds, decay=0.5)["a"]["direction"].score > found["a"]["direction"].score
    assert accumulate([]) == {}


def test_admm_meets_its_optimality_conditions() -> None:
    """L + S = X, and X - L - S is made of the dual: its singular values are at most 1, its blocks at most lambda."""
    B, A = stacks(8, 10, 2, 9)
    found = blocks.summarise(B, A)[0]
    split = admm.split([found], 2, 5000, 1e-9)
    assert split.converged
    assert bool((split.sparse >= 0).all())
    assert bool((split.sparse <= 1 + 1e-6).all())
    X = torch.diag(torch.tensor([3.0, 1.0, 0.5]))
    torch.testing.assert_close(admm.shrink_singular(X, 1.0), torch.diag(torch.tensor([2.0, 0.0, 0.0])))


def test_leading_is_the_scatter_of_the_products() -> None:
    B, A = stacks(5, 14, 3, 11)
    weights = torch.rand(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    W = B @ A
    scatter = torch.einsum("k,kab,kcb->ac", weights, W, W)
    values, vectors = torch.linalg.eigh(scatter)
    found, U = refine.leading(B, A, weights, vectors[:, -4:].flip(1))
    torch.testing.assert_close(found, values[-4:].flip(0))
    torch.testing.assert_close(U @ U.T, vectors[:, -4:] @ vectors[:, -4:].T)


def test_the_same_directions_by_the_gram_matrices() -> None:
    B, A = stacks(40, 300, 6, 280, dtype=torch.float32)
    g = torch.Generator().manual_seed(2)
    B[:, :, :3] += 4 * torch.randn(300, 3, generator=g)
    weights = torch.rand(40, generator=g, dtype=torch.float64)
    grams = blocks.Grams(blocks.gram_of(blocks.flat(B)), blocks.gram_of(A.reshape(240, -1).T))
    start = torch.randn(240, 3, generator=g)
    U = refine.leading(B, A, weights, blocks.flat(B) @ start, steps=8)[1]
    found = refine.leading_by_grams(blocks.flat(B), grams, weights, start, steps=8)
    assert float((found @ found.T - U @ U.T).norm()) < 1e-5
    torch.testing.assert_close(found.T @ found, torch.eye(3).double())


def test_soft_gains_are_signal_to_noise() -> None:
    gains = refine.soft_gains(torch.tensor([10.0, 2.0, 0.5]), total=12.5 + 7 * 1.0, places=10)
    torch.testing.assert_close(gains, torch.tensor([0.9, 0.5, 0.0]))


@pytest.mark.parametrize("by_grams", [False, True])
def test_iterated_mean_is_the_exact_one_where_there_is_a_gap(by_grams: bool) -> None:
    B, A = stacks(70, 600, 8, 560, dtype=torch.float32)
    g = torch.Generator().manual_seed(3)
    B[:, :, :3] += 6 * torch.randn(600, 3, generator=g)
    A[:, :3] += 6 * torch.randn(3, 560, generator=g)
    shares = torch.rand(70, generator=g, dtype=torch.float64)
    shares[5] = 0
    shares /= shares.sum()
    M = torch.einsum("k,kor,kri->oi", shares, B.double(), A.double())
    grams = blocks.Grams(blocks.gram_of(blocks.flat(B)), blocks.gram_of(A.reshape(560, -1).T)) if by_grams else None
    (left, right), low = refine.mean_update(B, A, shares, 3, 0, grams)
    U, S, Vh = torch.linalg.svd(M)
    best = (U[:, :3] * S[:3]) @ Vh[:3]
    assert float((low.B @ low.A - best).norm() / best.norm()) < 1e-5
    assert low.discarded == pytest.approx(
        float(S[3:].square().sum() / S.square().sum()), rel=0.01 if by_grams else 0.05
    )
    torch.testing.assert_close(left @ right, low.B @ low.A)
