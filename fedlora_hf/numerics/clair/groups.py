"""Groups of clients that agree within and not between: a tree of average similarities, cut where both sides are clear.

The similarities are those that the consensus core is found from. Where no cut is clear all clients are one group, which
is what CLAIR takes them for. Our choice, all of it; what it finds and what it costs: docs/clair.md.
"""
# SPDX-License-Identifier: Apache-2.0

from typing import NamedTuple

import torch
from torch import Tensor

# Fewest clients that are a group: two that agree. One alone agrees with nobody.
LEAST_MEMBERS = 2
# Two groups are apart when a client has less of the other's direction than this share of what either has within.
APART = 0.5
# ... and what each has within is this many chance similarities above what is between.
SURE = 5.0
# Share of the clients that the groups must hold together; where more are in none of them, nothing is clear.
COVERED = 0.6


class Group(NamedTuple):
    """members: sorted indices. within: mean similarity of two members. between: the largest mean similarity to another
    group; 0 where there is none."""

    members: list[int]
    within: float
    between: float


def groups(similarity: Tensor, chance: float) -> list[Group]:
    """The groups of K clients, the largest first (of equals the one with the smallest index); at least one.

    similarity: (K, K) cosines of the clients' changes. chance: root mean square similarity of unrelated clients.
    Clients in none of several groups are left out of the list. A single group has all clients in it.
    """
    found = _cut(similarity, chance)
    K = len(similarity)
    if len(found) < 2 or sum(map(len, found)) < COVERED * K:
        found = [list(range(K))]
    found.sort(key=lambda members: (-len(members), members[0]))
    between = [max((_mean(similarity, a, b) for b in found if b is not a), default=0.0) for a in found]
    return [Group(a, _within(similarity, a), b) for a, b in zip(found, between, strict=True)]


def everyone(similarity: Tensor, found: list[Group]) -> list[Group]:
    """The groups with every client in one: whoever is in none joins the one it is most like, if it has APART of what
    that has within, and else the largest, whose core then judges it."""
    members = [list(group.members) for group in found]
    inside = {k for group in found for k in group.members}
    for k in sorted(set(range(len(similarity))) - inside):
        likeness = [_mean(similarity, [k], group.members) / max(group.within, 1e-12) for group in found]
        best = max(range(len(found)), key=lambda place: (likeness[place], -place))
        members[best if likeness[best] >= APART else 0].append(k)
    return [group._replace(members=sorted(own)) for group, own in zip(found, members, strict=True)]


class _Node(NamedTuple):
    members: list[int]
    children: tuple["_Node", "_Node"] | None = None  # the larger first


def _tree(similarity: Tensor) -> _Node:
    """Average linkage: the two nodes of the largest mean similarity are joined, again and again; ties to the first."""
    K = len(similarity)
    mean = similarity.double().clone().fill_diagonal_(-torch.inf)
    nodes, sizes = [_Node([k]) for k in range(K)], torch.ones(K, dtype=torch.float64)
    for _ in range(K - 1):
        i, j = sorted(divmod(int(mean.argmax()), K))
        pair = sorted((nodes[i], nodes[j]), key=lambda node: (-len(node.members), node.members[0]))
        nodes[i] = _Node(sorted(nodes[i].members + nodes[j].members), (pair[0], pair[1]))
        joined = (sizes[i] * mean[i] + sizes[j] * mean[j]) / (sizes[i] + sizes[j])
        mean[i], mean[:, i], sizes[i] = joined, joined, sizes[i] + sizes[j]
        mean[j], mean[:, j], mean[i, i] = -torch.inf, -torch.inf, -torch.inf
    return nodes[0]


def _cut(similarity: Tensor, chance: float) -> list[list[int]]:
    """The groups beneath the root, members sorted; a single one where no cut is clear."""
    done: list[list[int]] = []
    waiting = [_tree(similarity)]
    while waiting:
        node = waiting.pop()
        halves = _halves(similarity, node, chance)
        if halves is None:
            done.append(node.members)
        else:
            waiting += halves
    return done


def _halves(similarity: Tensor, node: _Node, chance: float) -> list[_Node] | None:
    """The two parts that a node is cut into: at its root or, where that sets aside too few to be a group or clients
    opposed to the others, beneath it. None where no cut is clear."""
    while node.children is not None:
        large, small = node.children
        a, b = large.members, small.members
        within, between = min(_within(similarity, a), _within(similarity, b)), _mean(similarity, a, b)
        sure = within - max(between, 0.0) > SURE * chance
        if len(b) >= LEAST_MEMBERS and between > -APART * within:
            return [large, small] if sure and between < APART * within else None
        node = large  # what is set aside here is in no group, if there are several beneath
    return None


def _within(similarity: Tensor, members: list[int]) -> float:
    """Mean similarity of two of them; 1 for one alone."""
    n = len(members)
    block = similarity[members][:, members].double()
    return float((block.sum() - block.diagonal().sum()) / (n * (n - 1))) if n > 1 else 1.0


def _mean(similarity: Tensor, a: list[int], b: list[int]) -> float:
    return float(similarity[a][:, b].double().mean())
