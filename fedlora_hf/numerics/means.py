"""Robust means: coordinate-wise ones of stacked values, and those that need only the Gram of the clients' updates."""
# SPDX-License-Identifier: Apache-2.0

from typing import NamedTuple

import torch
from torch import Tensor


class Weights(NamedTuple):
    """Weights (K,) that sum to 1, and how the iteration that found them ended."""

    weights: Tensor
    n_iter: int
    converged: bool


def trimmed_mean(values: Tensor, count: int) -> Tensor:
    """Mean over dim 0 of (K, ...) without the `count` smallest and `count` largest of each coordinate; 2 count < K."""
    return values.sort(0).values[count : values.shape[0] - count].mean(0)


def median(values: Tensor) -> Tensor:
    """Coordinate-wise median over dim 0 of (K, ...); for even K the mean of the two middle values."""
    return trimmed_mean(values, (values.shape[0] - 1) // 2)


def squared_distances(gram: Tensor) -> Tensor:
    """(K, K): ||w_j - w_k||^2 from G[j, k] = <w_j, w_k>; exact zeros on the diagonal."""
    squares = gram.diagonal()
    return (squares[:, None] + squares - 2 * gram).clamp_min(0).fill_diagonal_(0)


def normalised(gram: Tensor) -> Tensor:
    """The Gram of w_k / ||w_k||; a zero w_k stays zero."""
    norms = gram.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
    return gram * inverse[:, None] * inverse


def krum_scores(distances: Tensor, num_contaminated: int) -> Tensor:
    """(K,): sum of squared distances (K, K) to the K - f - 2 nearest others (at least one, where there are others).

    Blanchard et al. 2017 (arXiv 1703.02757), section 4; f = num_contaminated.
    """
    K = distances.shape[0]
    nearest = min(max(K - num_contaminated - 2, 1), K - 1)
    # The client itself, at distance 0, sorts first.
    return distances.sort(1).values[:, 1 : nearest + 1].sum(1)


def krum_selection(distances: Tensor, num_contaminated: int, count: int) -> list[int]:
    """`count` of K clients, each the one of lowest Krum score among those not chosen yet (equal scores: the first).

    El Mhamdi et al. 2018 (arXiv 1802.07927), section 4, with squared distances (K, K).
    """
    left, chosen = list(range(distances.shape[0])), []
    for _ in range(count):
        scores = krum_scores(distances[left][:, left], num_contaminated)
        chosen.append(left.pop(int(scores.argmin())))
    return chosen


def mean_near_median(values: Tensor, count: int) -> Tensor:
    """Mean over dim 0 of (K, ...) of the `count` values of each coordinate that lie nearest to its median."""
    ordered = values.sort(0).values
    nearest = (ordered - median(values)).abs().sort(dim=0, stable=True).indices[:count]
    return ordered.gather(0, nearest).mean(0)


def geometric_median(gram: Tensor, weights: Tensor, tolerance: float, max_iterations: int) -> Weights:
    """c (K,) such that v = sum_k c_k w_k minimises sum_k p_k ||v - w_k||, from the Gram (K, K) alone.

    Smoothed Weiszfeld iteration (Pillutla et al. 2022, arXiv 1912.13445, algorithm 2): c_k proportional to
    p_k / max(nu, ||v - w_k||). The paper fixes nu; here it is 1e-6 of the mean distance from the first v, the plain
    mean, so that the scale of the updates does not matter [our choice], and never below the rounding of distances that
    come from a Gram. Stops when c changes by at most `tolerance` (sum of absolute changes).
    """
    c = weights = weights / weights.sum()
    smoothing = 1e-7 * float(gram.diagonal().mean().clamp_min(0).sqrt())
    if not smoothing:
        return Weights(c, 1, True)  # nobody changed anything
    for n_iter in range(1, max_iterations + 1):
        image = gram @ c
        distances = (c @ image - 2 * image + gram.diagonal()).clamp_min(0).sqrt()
        if n_iter == 1:
            smoothing = max(smoothing, 1e-6 * float(weights @ distances))
        new = weights / distances.clamp_min(smoothing)
        new = new / new.sum()
        change, c = float((new - c).abs().sum()), new
        if change <= tolerance:
            return Weights(c, n_iter, True)
    return Weights(c, max_iterations, False)
