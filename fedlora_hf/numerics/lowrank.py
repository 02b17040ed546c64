"""Low-rank matrices in factor space: products, norms, exact truncation, subspace distances.

W = B @ A with B (out, r) and A (r, in). No function here forms an (out, in) matrix.
"""
# SPDX-License-Identifier: Apache-2.0

from typing import NamedTuple

import torch
from torch import Tensor


class LowRank(NamedTuple):
    """A truncated W: B (out, q) and A (q, in); all singular values found; squared norm discarded, relative."""

    B: Tensor
    A: Tensor
    spectrum: Tensor
    discarded: float


def inner(B: Tensor, A: Tensor, other_B: Tensor, other_A: Tensor) -> Tensor:
    """<W, W'> = sum((B^T B') * (A A'^T)), a scalar tensor, without forming W (out, in)."""
    return ((B.T @ other_B) * (A @ other_A.T)).sum()


def output_root(B: Tensor, A: Tensor) -> Tensor:
    """X (out, r) with X X^T = W W^T: X = B (A A^T)^(1/2). Carries all of W that its column space needs."""
    values, vectors = torch.linalg.eigh(A @ A.T)
    return B @ (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def input_root(B: Tensor, A: Tensor) -> Tensor:
    """Y (in, r) with Y Y^T = W^T W: the same for the row space."""
    return output_root(A.T, B.T)


def truncate(B: Tensor, A: Tensor, rank: int) -> LowRank:
    """The best approximation of W of at most `rank`, by QR of both factors and an SVD of the (r, r) core.

    Singular values are split evenly between the factors. Signs are fixed (each left vector's largest entry is
    positive), so that equal input gives equal bytes.
    """
    Q_out, R_out = torch.linalg.qr(B)
    Q_in, R_in = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R_out @ R_in.T, full_matrices=False)
    kept = min(rank, S.shape[0])
    left, right = Q_out @ U[:, :kept], Vh[:kept] @ Q_in.T
    if kept:
        sign = left.gather(0, left.abs().argmax(0, keepdim=True)).squeeze(0).sign()
        sign = torch.where(sign == 0, torch.ones_like(sign), sign)
        left, right = left * sign, right * sign[:, None]
    root = S[:kept].sqrt()
    energy = S.square()
    total = float(energy.sum())
    return LowRank(left * root, right * root[:, None], S, float(energy[kept:].sum()) / total if total > 0 else 0.0)


def subspace_distance(U: Tensor, V: Tensor) -> float:
    """sin of the largest principal angle between span(U) and span(V), both orthonormal (n, q): 0 equal, 1 orthogonal.

    Computed from the part of U outside V, which is exact to rounding even when the spaces agree.
    """
    outside = U - V @ (V.T @ U)
    return float(torch.linalg.matrix_norm(outside, 2).clamp(max=1.0))
