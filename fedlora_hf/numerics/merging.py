"""Merging of updates entry by entry: trimming, sign election, random dropping."""
# SPDX-License-Identifier: Apache-2.0

import math

import torch
from torch import Tensor


def trim_threshold(W: Tensor, density: float) -> float:
    """The smallest size an entry of W needs to be among the round(density * entries) largest; 0 for density 1.

    A little below the exact value, so that a product formed in other blocks keeps the entry.
    """
    kept = max(1, math.floor(density * W.numel() + 1e-9))
    if kept >= W.numel():
        return 0.0
    return float(W.abs().flatten().kthvalue(W.numel() - kept + 1).values) * (1 - 1e-12)


def ties(values: Tensor, weights: Tensor, thresholds: Tensor) -> Tensor:
    """(K, ...) -> (...): the weighted mean of what agrees with the elected sign.

    Entries below their client's threshold (K,) are dropped; the sign of sum_k p_k v_k is elected (0: nobody's, and the
    result is 0); the mean is over the clients of that sign, with their weights' shares (Yadav et al. 2023, arXiv
    2306.01708, algorithm 1; weights as in mergekit with normalize).
    """
    shape = (-1, *(1,) * (values.ndim - 1))
    kept = torch.where(values.abs() >= thresholds.view(shape), values, torch.zeros_like(values))
    elected = (kept * weights.view(shape)).sum(0).sign()
    agree = (kept.sign() == elected) & (elected != 0)
    shares = agree * weights.view(shape)
    total = shares.sum(0)
    return torch.where(total > 0, (kept * shares).sum(0) / total.clamp_min(torch.finfo(values.dtype).tiny), total)


def dropped(W: Tensor, density: float, seed: int) -> Tensor:
    """W with each entry kept with probability `density`, independently, and divided by it (Yu et al. 2023, arXiv
    2311.03099): W in expectation. Drawn on the CPU from `seed`, so that every device drops the same entries."""
    kept = torch.rand(W.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) < density
    return W * kept.to(W.device) / density
