"""Truncated products of several modules of one shape at once, for a GPU: few launches, each for all of them.

As `gram.leading_part`, but H is decomposed by subspace iteration with Chebyshev polynomials (Zhou, Saad 2006), which is
products of matrices and nothing else. What it cannot tell to `gram.LOST` is left to `lowrank`, module by module.
"""
# SPDX-License-Identifier: Apache-2.0

import torch
from torch import Tensor

from fedlora_hf.numerics import gram, lowrank
from fedlora_hf.numerics.small import ON_CPU, cholesky_qr, eigh, orthonormal, svd

# Columns iterated on: as many as are decomposed at once where they lie, while LEAST of them are to spare, else those
# wanted and SPARE more.
COLUMNS, LEAST, SPARE = 32, 4, 16
# Highest degree of a polynomial, and how far it may draw the largest unfound direction apart from the rest: beyond it
# rounding along that one hides the others.
DEGREE, APART = 40, 1e10
CYCLES = 60
# What the rounding of the Gram matrices, and the shift that copies need, may come to, as a share of the largest
# eigenvalue. Larger directions are turned by less than that over their gap, smaller ones are 1e-5 of the product; what
# is projected on them is exact either way.
ROUNDING = 1e-10


def means_truncated(B: Tensor, A: Tensor, rank: int) -> list[lowrank.LowRank]:
    """The best approximation of B A of at most `rank` for each of M modules, from B (M, out, n) and A (M, n, in),
    float64, where they are; the result on the CPU. To 1e-6 of `lowrank.mean_truncated` of the same, where many columns
    are copies to 1e-5."""
    found = _by_grams(B, A, rank)
    return [low if low is not None else _one(B[m], A[m], rank) for m, low in enumerate(found)]


def _one(B: Tensor, A: Tensor, rank: int) -> lowrank.LowRank:
    low = lowrank.mean_truncated([(B, A)], [1.0], rank)
    return low._replace(B=low.B.cpu(), A=low.A.cpu(), spectrum=low.spectrum.cpu())


def _by_grams(B: Tensor, A: Tensor, rank: int) -> list[lowrank.LowRank | None]:
    """From the Gram matrices of both factors; None for a module that these do not tell well enough."""
    n = A.shape[1]
    if n > min(B.shape[1], A.shape[2]):
        return _of_products(B @ A, rank)
    left, right = gram.gram_of(B), gram.gram_of(A.mT)
    # Columns of zeros, as lower ranks are padded with, say nothing and have no Cholesky factor: 1 stands in for them.
    said = left.diagonal(dim1=1, dim2=2) > 0
    right = torch.where(said[:, :, None] & said[:, None, :], right, 0.0)
    traces, size = left.diagonal(dim1=1, dim2=2).sum(1), torch.linalg.matrix_norm(right)
    left = left + torch.diag_embed(torch.where(said, 0.0, traces[:, None] / n))
    L, shift = _cholesky(left, traces)
    total = (left * right).sum((1, 2))
    values, vectors, sound = leading_eigenpairs(L.mT @ (right @ L), min(rank, n))
    rounding = shift.clamp_min(torch.finfo(B.dtype).eps) * traces * size
    sound = sound & (total > 0) & (rounding < ROUNDING * values[:, -1])
    kept = values > gram.NOTHING * values[:, -1:]
    back = (right @ (L @ vectors)) * torch.where(kept, values, torch.inf).reciprocal()[:, None, :]
    U, turned = cholesky_qr(B @ back)
    inner = left @ (back @ turned)  # B^T U without a pass over B
    return _written(U, A.mT @ inner, total, sound & torch.isfinite(L).all((1, 2)), rank)


def _of_products(W: Tensor, rank: int) -> list[lowrank.LowRank | None]:
    """From W (M, out, in) itself, and the Gram matrix of its smaller side."""
    if W.shape[1] > W.shape[2]:
        return [None if low is None else _swapped(low) for low in _of_products(W.mT, rank)]
    H = W @ W.mT
    values, U, sound = leading_eigenpairs(H, min(rank, H.shape[1]))
    rounding = torch.finfo(W.dtype).eps * torch.linalg.matrix_norm(H)
    total = W.square().sum((1, 2))
    return _written(U, W.mT @ U, total, sound & (total > 0) & (rounding < ROUNDING * values[:, -1]), rank)


def _swapped(low: lowrank.LowRank) -> lowrank.LowRank:
    """Of the transpose."""
    B, A = lowrank.signed(low.A.mT, low.B.mT)
    return low._replace(B=B, A=A)


def _written(U: Tensor, N: Tensor, total: Tensor, sound: Tensor, rank: int) -> list[lowrank.LowRank | None]:
    """U N^T, U orthonormal, cut to a rank, on the CPU; total: squared norm of all that it is a part of."""
    Q, R = torch.linalg.qr(N)
    R = torch.where(torch.isfinite(R), R, 0.0)  # what is not finite is refused below; a decomposition would end all
    V, S, turn = svd(R)
    root = S[:, :rank].sqrt()
    out, inward = (U @ turn[:, :rank].mT) * root[:, None, :], root[..., None] * (Q @ V[:, :, :rank]).mT
    sound = sound & torch.isfinite(out).all((1, 2)) & torch.isfinite(inward).all((1, 2))
    parts = [part.cpu() for part in (out, inward, S, total, sound)]
    return [
        lowrank.LowRank(*lowrank.signed(b, a), s, max(float(t) - float(s[:rank].square().sum()), 0.0) / float(t))
        if bool(fine)
        else None
        for b, a, s, t, fine in zip(*parts, strict=True)
    ]


def _cholesky(left: Tensor, traces: Tensor) -> tuple[Tensor, Tensor]:
    """(L, the shift that each took as a share of its trace); NaN in L where no shift of `gram.SHIFTS` does."""
    shift = torch.zeros_like(traces)
    L, failed = torch.linalg.cholesky_ex(left)
    for larger in gram.SHIFTS[1:]:
        if not bool(failed.any()):
            break
        shift = torch.where(failed > 0, larger, shift)
        L, failed = torch.linalg.cholesky_ex(left + torch.diag_embed((shift * traces)[:, None].expand(left.shape[:2])))
    return torch.where(failed[:, None, None] > 0, torch.nan, L), shift


def leading_eigenpairs(H: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(eigenvalues (M, q) in ascending order, eigenvectors (M, n, q), (M,) bool whether found) of the `count` largest
    of H (M, n, n), positive semi-definite, float64, and of a few more that are less exact, to `gram.TOLERANCE`."""
    n, finite = H.shape[-1], torch.isfinite(H).all((1, 2))
    H = torch.where(finite[:, None, None], (H + H.mT) / 2, 0.0)
    columns = COLUMNS if count + LEAST <= COLUMNS else count + SPARE
    if n <= max(ON_CPU, 2 * columns):
        values, vectors = eigh(H)
        return values[:, -count:], vectors[:, :, -count:], finite
    start = torch.randn(n, columns, generator=torch.Generator().manual_seed(0), dtype=H.dtype).to(H.device)
    X = orthonormal(H @ orthonormal(H @ start))
    for _ in range(CYCLES):
        values, turn = eigh(X.mT @ (H @ X))
        X = X @ turn
        residual = torch.linalg.vector_norm(H @ X - X * values[:, None, :], dim=1)
        top, own = values[:, -1:], values.clamp_min(0)
        there = (residual <= gram.TOLERANCE * (top * own).sqrt()) | (own <= gram.NOTHING * top)
        left = ~there[:, -count:]
        if not bool(left.any()):
            break
        lowest = values[:, 0].clamp_min(1e-14 * values[:, -1]).clamp_min(1e-300)
        unfound = torch.where(there, 0.0, values).amax(1)
        # Directions that are found are taken out of H, so that they do not limit how far a polynomial may reach.
        X = orthonormal(_filtered(H, X, values, there, lowest, _degree(unfound, lowest, left.any(1))))
    return values, X, finite & there[:, -count:].all(1)


def _degree(unfound: Tensor, lowest: Tensor, open_: Tensor) -> int:
    """The degree at which the largest eigenvalue that is not found yet is APART from those below the columns."""
    growth = torch.acosh((2 * unfound / lowest - 1).clamp_min(1 + 1e-6))
    most = torch.log(torch.tensor(APART)) / growth[open_].amax()
    return int(most.clamp(1, DEGREE))


def _filtered(H: Tensor, X: Tensor, values: Tensor, there: Tensor, lowest: Tensor, degree: int) -> Tensor:
    """The Chebyshev polynomial of H, without what is found of it, that is small on [0, lowest] and grows beyond."""
    half = (2 / lowest)[:, None, None]
    found = torch.where(there[:, None, :], X, 0.0)
    rest = torch.baddbmm(H * half, found * (values[:, None, :] * half), found.mT, alpha=-1)
    before, now = X, rest @ X - X
    for _ in range(degree - 1):
        before, now = now, torch.baddbmm(2 * now + before, rest, now, beta=-1, alpha=2)
    return torch.where(there[:, None, :], X, now)
