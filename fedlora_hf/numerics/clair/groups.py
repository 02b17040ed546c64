"""Groups of clients that agree within and not between: branches of a tree of average similarities that stay apart.

The similarities are those that the consensus core is found from. Where none are clearly apart all clients are one
group, which is what CLAIR takes them for. Our choice, all of it; what it finds and what it costs: docs/clair.md.
"""
# SPDX-License-Identifier: Apache-2.0

from typing import NamedTuple

import torch
from torch import Tensor

from fedlora_hf.methods.clair import ClairOptions
from fedlora_hf.numerics.clair.consensus import cosines, majority_size, pooled, typical
from fedlora_hf.numerics.clair.estimator import look
from fedlora_hf.numerics.clair.source import Source

# Fewest clients that are a group: two that agree. One alone agrees with nobody.
LEAST_MEMBERS = 2
# Two groups are apart when a client has less of the other's direction than this share of what either has within.
APART = 0.5
# ... and what each has within is this many chance similarities above what is between.
SURE = 5.0


class Group(NamedTuple):
    """members: sorted indices. within: mean similarity of two members. between: the largest mean similarity to another
    group; 0 where there is none."""

    members: list[int]
    within: float
    between: float


def similarities(source: Source, options: ClairOptions) -> tuple[Tensor, float]:
    """((K, K) cosines of the clients' changes, all modules together, the root mean square of those by chance)."""
    seen = look(source, options, None)
    return cosines(pooled(seen.inner)), typical(cosines(pooled(seen.null)))


def groups(similarity: Tensor, chance: float) -> list[Group]:
    """The groups of K clients, the largest first (of equals the one with the smallest index); at least one.

    similarity: (K, K) cosines of the clients' changes. chance: root mean square similarity of unrelated clients.
    Clients in none of several groups are left out of the list. A single group has all clients in it, and so it is
    where the largest of several would be no majority: whom its adapter stands for would be anybody's guess.
    """
    similarity, K = similarity.double(), len(similarity)
    found = _joined(similarity, chance)
    if len(found) < 2 or max(map(len, found)) < majority_size(K):
        found = [list(range(K))]
    found.sort(key=lambda members: (-len(members), members[0]))
    between = [max((_mean(similarity, a, b) for b in found if b is not a), default=0.0) for a in found]
    return [Group(a, _within(similarity, a), b) for a, b in zip(found, between, strict=True)]


def everyone(similarity: Tensor, found: list[Group]) -> list[Group]:
    """The groups with every client in one: whoever is in none joins the one it is most like, if it has APART of what
    that has within, and else the largest, whose core then judges it."""
    similarity = similarity.double()
    members = [list(group.members) for group in found]
    inside = {k for group in found for k in group.members}
    for k in sorted(set(range(len(similarity))) - inside):
        likeness = [_mean(similarity, [k], group.members) / max(group.within, 1e-12) for group in found]
        best = max(range(len(found)), key=lambda place: (likeness[place], -place))
        members[best if likeness[best] >= APART else 0].append(k)
    return [group._replace(members=sorted(own)) for group, own in zip(found, members, strict=True)]


class _Branch(NamedTuple):
    """A branch of the tree: all its clients, and the groups that these are in, sorted indices each."""

    members: list[int]
    groups: list[list[int]]


def _joined(similarity: Tensor, chance: float) -> list[list[int]]:
    """The groups at the root of the tree. Average linkage: the two branches of the largest mean similarity are joined,
    again and again; ties to the first."""
    K = len(similarity)
    mean = similarity.clone().fill_diagonal_(-torch.inf)
    branches, sizes = [_Branch([k], [[k]]) for k in range(K)], torch.ones(K, dtype=torch.float64)
    for _ in range(K - 1):
        i, j = sorted(divmod(int(mean.argmax()), K))
        large, small = sorted((branches[i], branches[j]), key=lambda b: (-len(b.members), b.members[0]))
        branches[i] = _join(similarity, large, small, chance)
        joined = (sizes[i] * mean[i] + sizes[j] * mean[j]) / (sizes[i] + sizes[j])
        mean[i], mean[:, i], sizes[i] = joined, joined, sizes[i] + sizes[j]
        mean[j], mean[:, j], mean[i, i] = -torch.inf, -torch.inf, -torch.inf
    return branches[0].groups


def _join(similarity: Tensor, large: _Branch, small: _Branch, chance: float) -> _Branch:
    """Both branches as one: their groups where all are apart; those of the large one where the small one is set aside,
    its clients in none of them but for a single group that they are like; else a single group."""
    members = sorted(large.members + small.members)
    if _set_aside(similarity, large, small, chance):
        group, *others = large.groups
        alone = len(group) > 1 and _mean(similarity, group, small.members) < APART * _within(similarity, group)
        return _Branch(members, large.groups if others or alone else [sorted(group + small.members)])
    apart = all(_apart(similarity, a, b, chance) for a in large.groups for b in small.groups)
    return _Branch(members, large.groups + small.groups if apart else [members])


def _set_aside(similarity: Tensor, large: _Branch, small: _Branch, chance: float) -> bool:
    """Whether the small branch is too small or too loose for a group, or points against the large one."""
    if len(small.members) < LEAST_MEMBERS:
        return True
    within, typical = _within(similarity, small.groups[0]), _within(similarity, large.groups[0])
    if len(small.groups) == 1 and (within < APART * typical or within < SURE * chance):
        return True
    return _mean(similarity, large.members, small.members) < -APART * min(within, typical)


def _apart(similarity: Tensor, a: list[int], b: list[int], chance: float) -> bool:
    within, between = min(_within(similarity, a), _within(similarity, b)), _mean(similarity, a, b)
    return between < APART * within and within - max(between, 0.0) > SURE * chance


def _within(similarity: Tensor, members: list[int]) -> float:
    """Mean similarity of two of them; 1 for one alone."""
    n = len(members)
    block = similarity[members][:, members]
    return float((block.sum() - block.diagonal().sum()) / (n * (n - 1))) if n > 1 else 1.0


def _mean(similarity: Tensor, a: list[int], b: list[int]) -> float:
    return float(similarity[a][:, b].mean())
