"""The subspace a majority shares: leave-one-out energies and iteratively reweighted least squares, anchored at a core.

Minimises sum_k sqrt(sum_m ||(I - P_m) W_km||^2 / ||W_km||^2) over rank-constrained projectors, one weight per client
for all modules. Every client is judged by the subspace of the others: in-sample, an update pulls P to itself.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fedlora_hf.methods.clair import ClairOptions
from fedlora_hf.numerics.clair.blocks import Blocks, affinity
from fedlora_hf.numerics.clair.consensus import best, majority_size, ratings
from fedlora_hf.util.side_by_side import side_by_side

Found = TypeVar("Found")

MAX_RANK = 16  # most directions that "auto" looks at
CARRIES = 0.8  # share of what the majority shares that the judging rank must carry
OUTSIDE = 1e-6  # weight of a client outside the kept half
FLOOR = 1e-3  # smallest residual told apart
SETTLED = 10  # steps after which the kept half stays
# Numbers in all modules' coordinates from which they are worked on side by side, and how many modules at once.
LARGE, AT_ONCE = 1_000_000, 32
LOCAL = 48  # least dimension of the problem solved for each client


@dataclass(frozen=True, eq=False)
class Fit:
    """A subspace per module and what it says of every client.

    weights: (K,), largest 1. residual: (K,) held-out, root mean square over modules. kept: indices of the better half.
    gains: (M, K) held-out energy in the subspace less that of a random one. energies: per module (K, p), by direction.
    ranks: judged at, per module. majority: the gain, summed over modules, that a majority reaches.
    """

    weights: Tensor
    residual: Tensor
    kept: Tensor
    gains: Tensor
    energies: list[Tensor]
    ranks: tuple[int, ...]
    majority: float
    n_iter: int
    converged: bool


def each(modules: Sequence[Blocks], work: Callable[[int, Blocks], Found]) -> list[Found]:
    """work(place, blocks) of every module, in order, on several threads where there is enough of it."""
    large = sum(blocks.coords.numel() for blocks in modules) > LARGE
    return list(side_by_side(lambda m: work(m, modules[m]), range(len(modules)), large, AT_ONCE))


def scatter(coords: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in ascending order and eigenvectors (d, d) of the clients' weighted scatter in coordinates."""
    scaled = (coords * weights.sqrt().to(coords)[:, None, None]).permute(1, 0, 2).flatten(1)
    values, vectors = torch.linalg.eigh(scaled @ scaled.T)
    return values, vectors


def held_out_energies(
    coords: Tensor, weights: Tensor, limit: int, known: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """(K, p) energy of each client along the leading directions of the others' weighted scatter, largest first.

    One eigenproblem of size d for all, then one of size q = p + 2r per client that carries weight, in the basis of
    the q leading directions: the client's own part is subtracted there. Exact when q = d. known: of `scatter`.
    """
    _, d, r = coords.shape
    p = min(limit, d)
    values, vectors = scatter(coords, weights) if known is None else known
    q = min(d, max(p + 2 * r, LOCAL))
    values, vectors = values[-q:].flip(0), vectors[:, -q:].flip(1)
    local = vectors.T @ coords
    energy = local[:, :p].square().sum(2)
    own = (weights > 10 * OUTSIDE).nonzero().squeeze(1)
    part = local[own] @ local[own].transpose(1, 2)
    without = torch.diag(values) - weights[own].to(coords)[:, None, None] * part
    found = torch.linalg.eigh(without)[1][:, :, -p:].flip(2)
    energy[own] = (found.transpose(1, 2) @ local[own]).square().sum(2)
    return energy


def judging_rank(energy: Tensor, out: int) -> int:
    """Smallest rank whose gain over a random subspace is CARRIES of the best, and on over directions that carry half
    as much as those before do on average; energy (kept, p)."""
    mean = energy.mean(0)
    gain = (mean - 1 / out).cumsum(0)
    top = float(gain.max())
    if top <= 0:
        return 1
    rank = int((gain >= CARRIES * top).nonzero()[0]) + 1
    while rank < len(mean) and float(mean[rank]) > float(mean[:rank].mean()) / 2:
        rank += 1
    return rank


def shared_rank(energy: Tensor, out: int) -> int:
    """Directions that held-out clients use beyond chance: median energy over twice that of a random one in the rest."""
    typical = energy.median(0).values
    left = 1 - torch.cat([typical.new_zeros(1), typical.cumsum(0)[:-1]])
    places = out - torch.arange(len(typical), dtype=typical.dtype)
    used = (typical > 2 * left.clamp_min(0) / places.clamp_min(1)) & (typical > 1e-6)
    return max(int(used.long().cumprod(0).sum()), 1)


def _evaluate(
    modules: Sequence[Blocks], weights: Tensor, kept: Tensor, limit: int, ranks: Sequence[int] | None
) -> tuple[Tensor, Tensor, list[Tensor], tuple[int, ...]]:
    gains, residual, energies, chosen = [], torch.zeros(len(weights), dtype=torch.float64), [], []
    for m, energy in enumerate(each(modules, lambda _, own: held_out_energies(own.coords, weights, limit).double())):
        blocks = modules[m]
        rank = min(ranks[m], energy.shape[1]) if ranks else judging_rank(energy[kept], blocks.out)
        inside = energy[:, :rank].sum(1)
        gains.append(inside - rank / blocks.out)
        residual += (1 - inside).clamp_min(0)
        energies.append(energy)
        chosen.append(rank)
    return torch.stack(gains), (residual / len(modules)).sqrt(), energies, tuple(chosen)


def _majority_gain(gains: Tensor) -> float:
    """What the K // 2 + 1 best clients all reach, over all modules."""
    total = gains.sum(0)
    return float(total.sort(descending=True).values[majority_size(len(total)) - 1])


def common_use(modules: Sequence[Blocks], fit: Fit) -> float:
    """Whether the kept clients use the same directions: 1 where each uses the subspace at random, towards 0 where it is
    the union of what separate groups use. Median over the kept of their rating (see `consensus`) by overlap within
    the subspace, against energies as large as the kept's median."""

    def within(m: int, blocks: Blocks) -> tuple[Tensor, float]:
        local = scatter(blocks.coords, fit.weights)[1][:, -fit.ranks[m] :].T @ blocks.coords
        return fit.ranks[m] * affinity(local).double(), float(local[fit.kept].square().sum((1, 2)).median()) ** 2

    overlap, level = torch.zeros(len(fit.weights), len(fit.weights), dtype=torch.float64), 0.0
    for own, reached in each(modules, within):
        overlap += own
        level += reached
    return float(ratings(overlap)[fit.kept].median()) / max(level, 1e-12)


def _better_half(residual: Tensor, kept: Tensor) -> Tensor:
    """The clients of smallest residual; among equals (noiseless data) those kept before, then the first."""
    level = (residual / FLOOR).round().clamp_min(1)
    return best(-level.index_add(0, kept, torch.full_like(level[kept], -0.5)), majority_size(len(residual)))


def fixed_weights(modules: Sequence[Blocks], weights: Tensor, limit: int) -> Fit:
    """The fit that given weights (K,) lead to; no iteration."""
    kept = best(weights, majority_size(len(weights)))
    gains, residual, energies, ranks = _evaluate(modules, weights, kept, limit, None)
    kept = best(-residual, majority_size(len(weights)))
    return Fit(weights, residual, kept, gains, energies, ranks, _majority_gain(gains), 1, True)


def anchored(modules: Sequence[Blocks], start: Tensor, limit: int, max_iter: int, tol: float) -> Fit:
    """IRLS from the clients `start`, kept to the better half.

    Judging ranks are settled in the first four steps, the kept half in the first SETTLED; after that weights move by
    half steps. So two clients at the border of the kept half cannot swap places for ever.
    """
    K = len(modules[0].coords)
    weights = torch.full((K,), OUTSIDE, dtype=torch.float64).index_fill(0, start, 1.0)
    kept, ranks = start, None
    for step in range(max_iter):
        gains, residual, energies, found = _evaluate(modules, weights, kept, limit, ranks)
        ranks = found if step >= 3 else None
        if step < SETTLED:
            kept = _better_half(residual, kept)
        goal = torch.full_like(weights, OUTSIDE)
        goal[kept] = 1 / residual[kept].clamp_min(FLOOR)
        goal = (goal / goal.max()).clamp_min(OUTSIDE)
        goal = goal if step < SETTLED else (goal + weights) / 2
        converged = bool((goal - weights).abs().max() < tol)
        if converged:
            break
        weights = goal
    return Fit(weights, residual, kept, gains, energies, found, _majority_gain(gains), step + 1, converged)


def best_anchored(modules: Sequence[Blocks], starts: Sequence[Tensor], limit: int, options: ClairOptions) -> Fit:
    """The fit from the start whose subspace a majority shares most after two steps: a median-type objective, so a
    coherent minority cannot buy it."""
    starts = starts[:1] if all(torch.equal(start, starts[0]) for start in starts) else starts
    tried = [anchored(modules, start, limit, 2, options.tol) for start in starts]
    leader = max(range(len(starts)), key=lambda i: (tried[i].majority, -i))
    return anchored(modules, tried[leader].kept, limit, options.max_iter, options.tol)
