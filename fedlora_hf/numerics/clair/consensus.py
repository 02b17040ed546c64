"""Who agrees with a majority: the consensus core, its agreement, and whether that is more than chance.

A client is rated by how much it agrees with the h-th most similar other client, h = (K - 1) // 2: high only for a client that
agrees with half of the others, so a minority, however much alike, cannot rate itself high (our choice).
"""
# SPDX-License-Identifier: Apache-2.0

from typing import NamedTuple

import torch
from torch import Tensor

from fedlora_hf.numerics.clair.blocks import generator

NULL_DRAWS, NULL_CLIENTS = 49, 128


class Consensus(NamedTuple):
    """core: indices of the better half (sorted). agreement: the core's median rating. to_core: (K,) mean similarity
    to the core, own share left out; spread: (K,) its standard error; chance: rating that signs alone can give."""

    core: Tensor
    agreement: float
    to_core: Tensor
    spread: Tensor
    chance: float


def majority_size(n: int) -> int:
    """The smallest majority of n clients."""
    return n // 2 + 1


def ratings(similarity: Tensor) -> Tensor:
    """(K,) each client's h-th largest similarity to the others."""
    K = len(similarity)
    others = similarity.clone().fill_diagonal_(-torch.inf)
    return others.sort(dim=1, descending=True).values[:, max((K - 1) // 2, 1) - 1]


def best(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest, ties to the smaller index, sorted."""
    return values.argsort(descending=True, stable=True)[:count].sort().values


def cosines(inner: Tensor) -> Tensor:
    """(K, K) cosines from inner products; 0 for a zero update."""
    norm = inner.diag().clamp_min(0).sqrt()
    unit = torch.where(norm > 0, 1 / norm.clamp_min(1e-300), torch.zeros_like(norm))
    return (inner * unit[:, None] * unit).clamp(-1, 1)


def consensus(similarity: Tensor, signed: bool) -> Consensus:
    """The core of a (K, K) similarity. `signed`: similarities have a sign that chance could flip (cosines)."""
    K = len(similarity)
    rating = ratings(similarity)
    core = best(rating, majority_size(K))
    member = torch.zeros(K, dtype=similarity.dtype).index_fill(0, core, 1.0)
    others = similarity.clone().fill_diagonal_(0.0)
    count = (len(core) - member).clamp_min(1)
    to_core = (others * member).sum(1) / count
    square = (others.square() * member).sum(1) / count
    spread = ((square - to_core.square()).clamp_min(0) / count).sqrt()
    agreement = float(rating[core].median())
    return Consensus(core, agreement, to_core, spread, _chance(similarity) if signed else 0.0)


def _chance(cosine: Tensor) -> float:
    """Agreement of the same updates with signs drawn by lot: mean plus 3 standard deviations of a few draws.

    Updates without a common direction (V_k of mean zero in the paper's model) are as likely as their negatives,
    so this is what agreement amounts to there. At most NULL_CLIENTS clients, evenly spaced, are looked at.
    """
    step = -(-len(cosine) // NULL_CLIENTS)
    part = cosine[::step, ::step]
    K = len(part)
    signs = torch.randint(0, 2, (NULL_DRAWS, K), generator=generator(4)).to(part.dtype) * 2 - 1
    drawn = torch.stack([ratings(part * s[:, None] * s)[:].sort().values[-majority_size(K) :].median() for s in signs])
    return float(drawn.mean() + 3 * drawn.std())
