"""The convex reference: min ||L||_* + lambda sum_k sqrt(sum_m ||S_mk||_F^2), L_m + S_m = [X_m1 ... X_mK], by ADMM.

Nuclear norm for the shared subspace, block norms for the contaminated clients; blocks at unit norm. Works on the
coordinates of `blocks`, which changes neither norm (rotations from either side leave both alone).
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedlora_hf.numerics.clair.blocks import Blocks

# lambda = STRENGTH sqrt(rank / K) on unit blocks: sane between 1.4 and 2.2 (1 / sqrt(K) collapses to L = 0).
STRENGTH = 1.8
STEPS = 500  # it needs more steps than IRLS, each of them cheap


class Split(NamedTuple):
    """sparse: (K,) share of each client's norm that is in S. low: L per module, (d, K r). n_iter, converged."""

    sparse: Tensor
    low: list[Tensor]
    n_iter: int
    converged: bool


def shrink_singular(X: Tensor, amount: float) -> Tensor:
    """Proximal map of amount * nuclear norm, X (d, n): by the eigenvectors of X X^T, d being small."""
    values, vectors = torch.linalg.eigh(X @ X.T)
    singular = values.clamp_min(0).sqrt()
    gain = torch.where(singular > amount, 1 - amount / singular.clamp_min(1e-300), torch.zeros_like(singular))
    return (vectors * gain) @ (vectors.T @ X)


def split(modules: Sequence[Blocks], rank: int, max_iter: int, tol: float) -> Split:
    """Scaled-form ADMM (Boyd et al. 2011) with penalty 1: L by shrinking singular values module by module, S by
    shrinking clients over all modules at once. Stops when primal and dual residual fall below tol
    times the data's norm."""
    K = len(modules[0].coords)
    strength = STRENGTH * (rank / K) ** 0.5 * len(modules) ** 0.5
    X = [blocks.coords.double() for blocks in modules]
    S, dual = [torch.zeros_like(x) for x in X], [torch.zeros_like(x) for x in X]
    size = sum(float(x.square().sum()) for x in X) ** 0.5
    low, n_iter, converged = X, 0, False
    while n_iter < max_iter and not converged:
        n_iter += 1
        low = [_blocked(x - s + u, 1.0) for x, s, u in zip(X, S, dual, strict=True)]
        rest = [x - w + u for x, w, u in zip(X, low, dual, strict=True)]
        norm = torch.stack([part.square().sum((1, 2)) for part in rest]).sum(0).sqrt()
        gain = (1 - strength / norm.clamp_min(1e-300)).clamp_min(0)[:, None, None]
        old, S = S, [part * gain for part in rest]
        gap = [x - w - s for x, w, s in zip(X, low, S, strict=True)]
        dual = [u + g for u, g in zip(dual, gap, strict=True)]
        primal = sum(float(g.square().sum()) for g in gap) ** 0.5
        moved = sum(float((s - o).square().sum()) for s, o in zip(S, old, strict=True)) ** 0.5
        converged = max(primal, moved) < tol * size
    sparse = torch.stack([s.square().sum((1, 2)) for s in S]).sum(0).sqrt()
    whole = torch.stack([x.square().sum((1, 2)) for x in X]).sum(0).sqrt()
    return Split(sparse / whole.clamp_min(1e-300), low, n_iter, converged)


def _blocked(x: Tensor, amount: float) -> Tensor:
    """`shrink_singular` of (K, d, r) blocks side by side."""
    K, d, r = x.shape
    return shrink_singular(x.permute(1, 0, 2).reshape(d, K * r), amount).reshape(d, K, r).permute(1, 0, 2)
