"""Clipped means from the Gram of clients' changes alone: a mean is its coefficients c, v = sum_k c_k d_k."""
# SPDX-License-Identifier: Apache-2.0

import torch
from torch import Tensor


def lower_median(values: Tensor) -> float:
    """The median of (K,), for even K the smaller of the two middle values: one of the values, to the bit."""
    return float(values.sort().values[(values.shape[0] - 1) // 2])


def clip_factors(norms: Tensor, radius: float) -> Tensor:
    """(K,): min(1, radius / norm), exactly 1 where the norm is not above the radius (a zero norm included)."""
    return torch.where(norms > radius, radius / norms.clamp_min(torch.finfo(norms.dtype).tiny), torch.ones_like(norms))


def norms(gram: Tensor) -> Tensor:
    """(K,): ||d_k|| from G[j, k] = <d_j, d_k>."""
    return gram.diagonal().clamp_min(0).sqrt()


def distances_to(gram: Tensor, c: Tensor) -> Tensor:
    """(K,): ||d_k - v|| for v = sum_j c_j d_j."""
    image = gram @ c
    return (gram.diagonal() - 2 * image + c @ image).clamp_min(0).sqrt()


def centred(gram: Tensor, weights: Tensor, radius: float | None, steps: int) -> tuple[Tensor, list[float]]:
    """(c (K,), the radius of each step): v <- v + sum_k p_k (d_k - v) min(1, radius / ||d_k - v||), from v = 0.

    Karimireddy, He and Jaggi 2021 (arXiv 2012.10333), section 4, with weights p_k that sum to 1. radius None: in every
    step the lower median of the distances ||d_k - v|| [our choice; the paper tunes one number].
    """
    c, radii = torch.zeros_like(weights), []
    for _ in range(steps):
        distances = distances_to(gram, c)
        radii.append(lower_median(distances) if radius is None else radius)
        pull = weights * clip_factors(distances, radii[-1])
        c = c * (1 - pull.sum()) + pull
    return c, radii
