"""Factor space against dense matrices: products, sums, truncations, angles."""
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlora_hf.numerics import lowrank


def pairs_of(seed: int, out: int, width: int, ranks: list[int]) -> list[lowrank.Pair]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(out, r, generator=generator).double(), torch.randn(r, width, generator=generator).double())
        for r in ranks
    ]


def best_error(W: Tensor, rank: int) -> float:
    """Squared norm that no matrix of at most `rank` can do without (Eckart-Young)."""
    return float(torch.linalg.svdvals(W)[rank:].square().sum())


sizes = st.integers(1, 12)
rank_lists = st.lists(st.integers(1, 6), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**20), sizes, sizes, st.integers(1, 8), st.integers(1, 10))
def test_truncate_is_the_eckart_young_optimum(seed: int, out: int, width: int, r: int, rank: int) -> None:
    ((B, A),) = pairs_of(seed, out, width, [r])
    W, low = B @ A, lowrank.truncate(B, A, rank)
    total = float(W.square().sum())
    lost = float((W - low.B @ low.A).square().sum())
    assert lost <= best_error(W, rank) + 1e-12 * total
    assert low.discarded * total == pytest.approx(best_error(W, rank), abs=1e-12 * total)
    assert low.B.shape[1] == low.A.shape[0] <= rank
    # Split evenly: both factors carry the same energy along each direction.
    assert torch.allclose(low.B.square().sum(0), low.A.square().sum(1), rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**20), sizes, sizes, rank_lists, st.integers(1, 12))
def test_mean_truncated_is_the_best_part_of_the_dense_sum(
    seed: int, out: int, width: int, ranks: list[int], rank: int
) -> None:
    pairs = pairs_of(seed, out, width, ranks)
    weights = [(k + 1) * (-1.0 if k % 3 == 2 else 0.5) for k in range(len(pairs))]
    W = sum((weight * B @ A for weight, (B, A) in zip(weights, pairs, strict=True)), torch.zeros(out, width).double())
    low = lowrank.mean_truncated(pairs, weights, rank)
    total = float(W.square().sum())
    lost = float((W - low.B @ low.A).square().sum())
    assert lost <= best_error(W, rank) + 1e-12 * total
    assert low.discarded * total == pytest.approx(best_error(W, rank), abs=1e-12 * total)


@pytest.mark.parametrize("count", [3, 200], ids=["factors", "sum"])
def test_mean_truncated_on_both_sides_of_the_switch(count: int) -> None:
    """Few clients go through QR of the factors, many through the sum; at full rank nothing may be lost by either."""
    pairs = pairs_of(count, 60, 50, [4] * count)
    W = sum((B @ A for B, A in pairs), torch.zeros(60, 50).double()) / count
    low = lowrank.mean_truncated(pairs, [1 / count] * count, 50)
    assert torch.linalg.matrix_norm(low.B @ low.A - W) <= 1e-12 * torch.linalg.matrix_norm(W)
    assert low.discarded <= 1e-12


@pytest.mark.parametrize("decay", [0.5, 0.05, 0.0], ids=["steep", "slow", "flat"])
def test_large_matrices_give_the_same_leading_part_as_a_full_svd(decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found without a full SVD unless the spectrum is flat."""
    sizes_seen: list[int] = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda W, **how: (sizes_seen.append(min(W.shape)), svd(W, **how))[1])
    generator = torch.Generator().manual_seed(3)
    size, rank = lowrank.FULL_SVD + 40, 8
    U, V = (torch.linalg.qr(torch.randn(size, size, generator=generator).double())[0] for _ in range(2))
    S = torch.exp(-decay * torch.arange(size, dtype=torch.float64)) + 1e-3 * torch.rand(size, generator=generator)
    low = lowrank.truncate_dense((U * S) @ V.T, rank)
    assert (max(sizes_seen) < size) == (decay > 0)
    exact = S.sort(descending=True).values
    assert torch.allclose(low.spectrum[:rank], exact[:rank], rtol=1e-12)
    assert low.discarded == pytest.approx(float(exact[rank:].square().sum() / exact.square().sum()), rel=1e-9)
    residual = torch.linalg.matrix_norm((U * S) @ V.T - low.B @ low.A) ** 2
    assert float(residual) == pytest.approx(float(exact[rank:].square().sum()), rel=1e-9)


def test_a_large_zero_matrix_has_nothing_to_lose() -> None:
    low = lowrank.truncate_dense(torch.zeros(lowrank.FULL_SVD + 1, lowrank.FULL_SVD + 1).double(), 2)
    assert low.discarded == 0.0
    assert not (low.B @ low.A).any()


def test_equal_input_gives_equal_bytes_and_fixed_signs() -> None:
    ((B, A),) = pairs_of(1, 9, 7, [3])
    one, two = lowrank.truncate(B, A, 3), lowrank.truncate(B.clone(), A.clone(), 3)
    assert torch.equal(one.B, two.B)
    assert torch.equal(one.A, two.A)
    flipped = lowrank.truncate(-B, -A, 3)
    assert torch.allclose(one.B, flipped.B)
    largest = one.B.gather(0, one.B.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**20), sizes, sizes, rank_lists, rank_lists)
def test_inner_products_match_dense(seed: int, out: int, width: int, ranks: list[int], others: list[int]) -> None:
    left, right = pairs_of(seed, out, width, ranks), pairs_of(seed + 1, out, width, others)
    dense_left = torch.stack([(B @ A).flatten() for B, A in left])
    dense_right = torch.stack([(B @ A).flatten() for B, A in right])
    assert torch.allclose(lowrank.inner_products(left, right), dense_left @ dense_right.T, atol=1e-9)
    own = lowrank.inner_products(left)
    assert torch.allclose(own, dense_left @ dense_left.T, atol=1e-9)
    assert torch.equal(own, own.T)


def test_inner_products_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = pairs_of(0, 10, 8, [3, 1, 2, 3, 2, 1, 3])
    whole = lowrank.inner_products(pairs)
    monkeypatch.setattr(lowrank, "CHUNK", 6)
    assert torch.allclose(lowrank.inner_products(pairs), whole, rtol=1e-12)
    assert torch.allclose(lowrank.inner_products(pairs, pairs), whole, rtol=1e-12)


def test_half_precision_is_lifted_before_it_is_multiplied() -> None:
    pairs = [(B.bfloat16(), A.bfloat16()) for B, A in pairs_of(2, 30, 20, [4, 4, 2])]
    dense = torch.stack([(B.double() @ A.double()).flatten() for B, A in pairs])
    assert torch.allclose(lowrank.inner_products(pairs), dense @ dense.T, rtol=1e-12)
    low = lowrank.mean_truncated(pairs, [0.2, 0.3, 0.5], 10)
    expected = (torch.tensor([[0.2], [0.3], [0.5]]).double() * dense).sum(0).view(30, 20)
    assert torch.allclose(low.B @ low.A, expected, atol=1e-6)


def test_roots_carry_the_products_with_themselves() -> None:
    ((B, A),) = pairs_of(4, 9, 7, [3])
    W = B @ A
    X, Y = lowrank.output_root(B, A), lowrank.input_root(B, A)
    assert torch.allclose(X @ X.T, W @ W.T)
    assert torch.allclose(Y @ Y.T, W.T @ W)
    assert torch.allclose(lowrank.inner(B, A, B, A), W.square().sum())


def test_subspace_distance_is_the_sine_of_the_angle() -> None:
    angle = torch.tensor(0.3, dtype=torch.float64)
    U = torch.eye(4, 2, dtype=torch.float64)
    V = U.clone()
    V[1, 1], V[3, 1] = angle.cos(), angle.sin()
    assert lowrank.subspace_distance(U, V) == pytest.approx(float(angle.sin()))
    assert lowrank.subspace_distance(U, U) == 0.0
    assert lowrank.subspace_distance(U, torch.eye(4, dtype=torch.float64)[:, 2:]) == 1.0
