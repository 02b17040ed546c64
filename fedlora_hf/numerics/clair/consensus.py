"""Who agrees with a majority: the consensus core, its agreement, and what chance would give.

A client is rated by its similarity to the h-th most similar other client, h = K // 2: high only for a client that,
with those it agrees with, makes a majority, so a minority, however much alike, cannot rate itself high (our choice).
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

COPY = 1 - 1e-6
AT_ONCE = 256  # rows of the modules' inner products that are added up at once


class Consensus(NamedTuple):
    """core: indices of the better half (sorted). agreement: the core's median rating. to_core: (K,) mean similarity
    to the core, own share left out; spread: (K,) its standard error."""

    core: Tensor
    agreement: float
    to_core: Tensor
    spread: Tensor


def majority_size(n: int) -> int:
    """The smallest majority of n clients."""
    return n // 2 + 1


def ratings(similarity: Tensor) -> Tensor:
    """(K,) each client's h-th largest similarity to the others."""
    K = len(similarity)
    others = similarity.clone().fill_diagonal_(-torch.inf)
    return others.sort(dim=1, descending=True).values[:, max(K // 2, 1) - 1]


def best(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest, ties to the smaller index, sorted."""
    return values.argsort(descending=True, stable=True)[:count].sort().values


def pooled(inner: Sequence[Tensor]) -> Tensor:
    """(K, K) sum of inner products over modules, some rows at a time: of many clients, no second copy of all."""
    steps = range(0, len(inner[0]), AT_ONCE)
    return torch.cat([torch.stack([G[first : first + AT_ONCE] for G in inner]).sum(0) for first in steps])


def cosines(inner: Tensor) -> Tensor:
    """(K, K) cosines from inner products; 0 for a zero update."""
    norm = inner.diag().clamp_min(0).sqrt()
    unit = torch.where(norm > 0, 1 / norm.clamp_min(1e-300), torch.zeros_like(norm))
    return (inner * unit[:, None] * unit).clamp(-1, 1)


def copies(similarity: Tensor) -> list[list[int]]:
    """Groups of clients whose updates are the same but for a positive factor (cosines, (K, K)): never flagged for it,
    since nobody can tell the copy from the original."""
    groups = {tuple(row.nonzero().squeeze(1).tolist()) for row in similarity > COPY}
    return [list(group) for group in sorted(groups) if len(group) > 1]


def counted_once(similarity: Tensor) -> Tensor:
    """(K,) weights: a copy counts as its share of one client, unless copies are the majority (our choice)."""
    weights = torch.ones(len(similarity), dtype=torch.float64)
    for group in copies(similarity):
        if len(group) < majority_size(len(similarity)):
            weights[group] = 1 / len(group)
    return weights


def independent(similarity: Tensor) -> Tensor:
    """The (K, K) similarity with copies as unrelated to each other: an update sent twice is no agreement."""
    several = counted_once(similarity) < 1
    return torch.where((similarity > COPY) & several & ~torch.eye(len(similarity), dtype=torch.bool), 0.0, similarity)


def consensus(similarity: Tensor) -> Consensus:
    """The core of a (K, K) similarity."""
    K = len(similarity)
    rating = ratings(similarity)
    core = best(rating, majority_size(K))
    member = torch.zeros(K, dtype=similarity.dtype).index_fill(0, core, 1.0)
    others = similarity.clone().fill_diagonal_(0.0)
    count = (len(core) - member).clamp_min(1)
    to_core = (others * member).sum(1) / count
    square = (others.square() * member).sum(1) / count
    spread = ((square - to_core.square()).clamp_min(0) / count).sqrt()
    return Consensus(core, float(rating[core].median()), to_core, spread)


def chance_agreement(null: Tensor, members: Tensor | None = None) -> float:
    """Agreement by chance: that of a (K, K) similarity without common direction, plus 4 standard errors.

    members: indices of the clients to look at, those of the core (None: all). Near-copies outside it resemble each
    other with their signs drawn at random too, and a minority of them would hide that the others agree.
    """
    looked_at = null if members is None else null[members][:, members]
    return consensus(looked_at).agreement + 4 * typical(looked_at) / len(null) ** 0.5


def opposition(similarity: Tensor, members: Tensor) -> float:
    """How far members point against each other: root mean square of their negative similarities, scaled so that
    for unrelated clients, as often for as against each other, it is that of all."""
    among = similarity[members][:, members]
    against = among[~torch.eye(len(members), dtype=torch.bool)].clamp_max(0)
    return float((2 * against.square().mean()).sqrt())


def typical(null: Tensor) -> float:
    """Root mean square similarity by chance, null (K, K)."""
    return float(null[~torch.eye(len(null), dtype=torch.bool)].square().mean().sqrt())
