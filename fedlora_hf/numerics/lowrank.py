"""Low-rank matrices in factor space: inner products, exact sums and truncations, subspace distances.

W = B @ A with B (out, r) and A (r, in); a *pair* is (B, A), any scale folded in. Ranks may differ from pair to pair.
Computed in the dtype given, except where a function says float64. Only `mean_truncated` may form an (out, in) matrix,
and only when the factors it would otherwise have to hold are larger.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedlora_hf.numerics import gram

Pair = tuple[Tensor, Tensor]

# Columns that one matrix product handles at a time: wide enough to be fast, narrow enough to stay small.
CHUNK = 1024
# Up to this size a full SVD takes well under a second; above it only the leading part is computed.
FULL_SVD = 512
# Residual, relative to the largest singular value, at which a leading triplet counts as found: far below what float32
# factors can hold, and the energy it leaves uncertain is its square.
TOLERANCE = 1e-8


class LowRank(NamedTuple):
    """A truncated W: B (out, q) and A (q, in); the singular values found, at least q; squared norm lost, relative."""

    B: Tensor
    A: Tensor
    spectrum: Tensor
    discarded: float


def inner(B: Tensor, A: Tensor, other_B: Tensor, other_A: Tensor) -> Tensor:
    """<W, W'> = sum((B^T B') * (A A'^T)), a scalar tensor, without forming W (out, in)."""
    return ((B.T @ other_B) * (A @ other_A.T)).sum()


def inner_products(pairs: Sequence[Pair], other: Sequence[Pair] | None = None) -> Tensor:
    """G (K, K') float64 with G[j, k] = <W_j, W'_k>, from the factors alone; `other` defaults to `pairs` (G symmetric).

    Pairs are stacked once, in float64 and zero-padded to the largest rank; cost O(K K' r^2 (out + in)).
    """
    return stacked_products(stacked(pairs), None if other is None else stacked(other))


def stacked_products(left: Pair, right: Pair | None = None) -> Tensor:
    """The same of pairs that are stacked: all B^T (K, r, out) and all A (K, r, in)."""
    (left_B, left_A), other = left, right
    right_B, right_A = left if right is None else right
    (K, r), (width, s) = left_A.shape[:2], right_A.shape[:2]
    G = left_A.new_zeros(K, width)
    step = max(1, CHUNK // max(r, 1))
    for start in range(0, K, step):
        first = start if other is None else 0  # the lower triangle is the mirror of the upper one
        rows = slice(start, start + step)
        products = left_B[rows].flatten(0, 1) @ right_B[first:].flatten(0, 1).T
        products *= left_A[rows].flatten(0, 1) @ right_A[first:].flatten(0, 1).T
        G[rows, first:] = products.view(-1, r, width - first, s).sum((1, 3))
    return G if other is not None else G.triu() + G.triu(1).T


def stacked(pairs: Sequence[Pair]) -> Pair:
    """All B^T (K, r, out) and all A (K, r, in), float64, zero-padded to the largest rank r, on the first's device."""
    (B, A), rank = pairs[0], max(A.shape[0] for _, A in pairs)
    all_B = torch.zeros(len(pairs), rank, B.shape[0], dtype=torch.float64, device=A.device)
    all_A = torch.zeros(len(pairs), rank, A.shape[1], dtype=torch.float64, device=A.device)
    for k, (B, A) in enumerate(pairs):
        all_B[k, : A.shape[0]] = B.T
        all_A[k, : A.shape[0]] = A
    return all_B, all_A


def output_root(B: Tensor, A: Tensor) -> Tensor:
    """X (out, r) with X X^T = W W^T: X = B (A A^T)^(1/2). Carries all of W that its column space needs."""
    values, vectors = torch.linalg.eigh(A @ A.T)
    return B @ (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def input_root(B: Tensor, A: Tensor) -> Tensor:
    """Y (in, r) with Y Y^T = W^T W: the same for the row space."""
    return output_root(A.T, B.T)


def truncate(B: Tensor, A: Tensor, rank: int) -> LowRank:
    """The best approximation of W of at most `rank` (Eckart-Young): QR of both factors, SVD of the (r, r) core.

    Singular values are split evenly between the factors. Signs are fixed (each left vector's largest entry is
    positive), so that equal input gives equal bytes.
    """
    Q_out, R_out = torch.linalg.qr(B)
    Q_in, R_in = torch.linalg.qr(A.T)
    core = truncate_dense(R_out @ R_in.T, rank)
    return LowRank(*signed(Q_out @ core.B, core.A @ Q_in.T), core.spectrum, core.discarded)


def _truncate_many(B: Tensor, A: Tensor, rank: int) -> LowRank:
    """`truncate` in float64; of more than FULL_SVD columns the leading part alone, by their Gram matrices where these
    tell it to 1e-6 of W. The discarded energy is exact either way: all of W's less what was kept."""
    found = None
    if A.shape[0] > FULL_SVD and 4 * (rank + gram.SPARE) <= A.shape[0]:
        found = gram.leading_part(B, A, rank)
    if found is None:
        return truncate(B, A, rank)
    root = found.S.sqrt()
    lost = max(found.total - float(found.S.square().sum()), 0.0) / found.total
    return LowRank(*signed(found.U * root, found.Vh * root[:, None]), found.S, lost)


def truncate_dense(W: Tensor, rank: int) -> LowRank:
    """The best approximation of a matrix W (out, in) of at most `rank`; signs as in `truncate`.

    By a full SVD up to FULL_SVD rows or columns; above, the leading part alone is found, to TOLERANCE, and the
    discarded energy is the exact total less what was kept.
    """
    U, S, Vh = _leading(W, rank)
    kept = min(rank, S.shape[0])
    energy, total = S.square(), float(W.square().sum())
    lost = float(energy[kept:].sum()) if S.shape[0] == min(W.shape) else total - float(energy[:kept].sum())
    root = S[:kept].sqrt()
    B, A = signed(U[:, :kept] * root, Vh[:kept] * root[:, None])
    return LowRank(B, A, S, max(lost, 0.0) / total if total > 0 else 0.0)


def concatenated(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """(B, A) of rank n = sum r_k with B A = sum_k weights[k] W_k, float64, in the order of the pairs."""
    ranks = torch.tensor([A.shape[0] for _, A in pairs])
    factors = torch.tensor(weights, dtype=torch.float64).repeat_interleave(ranks)
    B, A = (torch.cat([pair[side] for pair in pairs], dim=1 - side).to(torch.float64) for side in (0, 1))
    return B.mul_(factors.to(B)), A


def mean_truncated(pairs: Sequence[Pair], weights: Sequence[float], rank: int) -> LowRank:
    """sum_k weights[k] W_k, exactly, cut to the best approximation of at most `rank`; float64 inside and out.

    Works on whichever is smaller: the concatenated factors (QR and a small SVD, or their Gram matrices where n is above
    FULL_SVD), or, once the total rank n makes them hold more numbers than W itself, n (out + in) > out * in, the sum W.
    Either is held once, whatever the number of pairs. The order of the pairs is the order of the sum.
    """
    (B, A), ranks = pairs[0], [A.shape[0] for _, A in pairs]
    out, width = B.shape[0], A.shape[1]
    if sum(ranks) * (out + width) <= out * width:
        return _truncate_many(*concatenated(pairs, weights), rank)
    W = torch.zeros(out, width, dtype=torch.float64, device=A.device)
    step = max(1, CHUNK // max(*ranks, 1))
    for start in range(0, len(pairs), step):
        chunk = slice(start, start + step)
        W.addmm_(*concatenated(pairs[chunk], weights[chunk]))
    return truncate_dense(W, rank)


def subspace_distance(U: Tensor, V: Tensor) -> float:
    """sin of the largest principal angle between span(U) and span(V), both orthonormal (n, q): 0 equal, 1 orthogonal.

    Computed from the part of U outside V, which is exact to rounding even when the spaces agree.
    """
    outside = U - V @ (V.T @ U)
    return float(torch.linalg.matrix_norm(outside, 2).clamp(max=1.0))


def signed(B: Tensor, A: Tensor) -> Pair:
    """The same product with each column of B turned so that its largest entry is positive."""
    if not B.numel():
        return B, A
    sign = B.gather(0, B.abs().argmax(0, keepdim=True)).squeeze(0).sign()
    sign = torch.where(sign == 0, torch.ones_like(sign), sign)
    return B * sign, A * sign[:, None]


def _leading(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vh of W: all of them where that is cheap, else the leading `rank`.

    The large case is a block Krylov iteration, Rayleigh-Ritz on a basis of the row space that grows by the residuals
    (Golub and Van Loan, Matrix Computations, 10.4), from a fixed start, so that equal input gives equal bytes. When the
    spectrum is too flat for it, the full SVD does the work.
    """
    size, block = min(W.shape), rank + 8
    if size <= FULL_SVD or 4 * block > size:
        return torch.linalg.svd(W, full_matrices=False)
    start = torch.randn(W.shape[0], block, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(W.T @ start.to(W))[0]
    image = W @ basis
    while True:
        Q, R = torch.linalg.qr(image)
        U, S, Vh = torch.linalg.svd(R)
        left, right = Q @ U[:, :block], basis @ Vh[:block].T
        residuals = W.T @ left - right * S[:block]
        norms = torch.linalg.vector_norm(residuals, dim=0)
        open_ = norms > TOLERANCE * S[0]
        if not bool(open_[:rank].any()):
            return left[:, :rank], S[:rank], right[:, :rank].T
        if basis.shape[1] > size // 4:
            return torch.linalg.svd(W, full_matrices=False)
        new = residuals[:, open_]
        for _ in range(2):  # twice is enough to be orthogonal to rounding
            new = torch.linalg.qr(new - basis @ (basis.T @ new))[0]
        basis, image = torch.cat([basis, new], dim=1), torch.cat([image, W @ new], dim=1)
