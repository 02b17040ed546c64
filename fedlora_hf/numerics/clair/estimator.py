"""CLAIR over modules that are read one at a time: one pass to see, the solver on what was kept, one pass to refine."""
# SPDX-License-Identifier: Apache-2.0

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from fedlora_hf.errors import ConfigError, ConvergenceWarning, UpdateError
from fedlora_hf.methods.clair import LEAST_CLIENTS, ClairOptions
from fedlora_hf.numerics import lowrank
from fedlora_hf.numerics.clair import admm, refine
from fedlora_hf.numerics.clair.blocks import Blocks, Grams, affinity, flat, summarise
from fedlora_hf.numerics.clair.consensus import consensus, cosines, counted_once, independent, pooled
from fedlora_hf.numerics.clair.evidence import Judgement, judge, unjudged
from fedlora_hf.numerics.clair.influence import influence
from fedlora_hf.numerics.clair.refine import ModuleFit, Pair
from fedlora_hf.numerics.clair.subspace import (
    MAX_RANK,
    OUTSIDE,
    Fit,
    best_anchored,
    fixed_weights,
    held_out_energies,
    shared_rank,
)
from fedlora_hf.util.side_by_side import side_by_side

# A norm below this share of the typical one is a zero update.
NOTHING = 1e-6


class Source(Protocol):
    """Where the clients' factors come from, module by module, stacked: B (K, out, r) and A (K, r, in), zero-padded to
    one rank, scale folded in. `change` is what clients learned this round, `whole` what they hold; `restarted` says
    that they are the same."""

    @property
    def modules(self) -> Sequence[str]: ...
    @property
    def restarted(self) -> bool: ...
    def change(self, module: str) -> Pair: ...
    def whole(self, module: str) -> Pair: ...
    @property
    def large(self) -> bool:
        """Whether a module is worth a thread of its own."""
        ...

    def with_start(self, module: str) -> Pair:
        """`whole` with one row more: what the clients started from, B (K + 1, out, r) and A (K + 1, r, in). Asked for
        only where not `restarted`."""
        ...


@dataclass(frozen=True, eq=False)
class Solution:
    """judgement: evidence on every client. flagged: (K,) bool. weights: (K,) of the subspace fit, 0 for flagged or zero
    updates. shares: (K,) in the mean. kept: (K,) what is left of each client's influence, see `influence`.
    module_scores: {module: {kind: (K,)}}. fits: {module: ModuleFit}, of the transposed updates when side is "input"."""

    judgement: Judgement
    flagged: Tensor
    weights: Tensor
    shares: Tensor
    kept: Tensor
    module_scores: Mapping[str, Mapping[str, Tensor]]
    fits: Mapping[str, ModuleFit]
    n_iter: int
    converged: bool


@dataclass(frozen=True, eq=False)
class _Seen:
    """The first pass: per module blocks (all clients), inner products of the clients and by chance, scaled to the
    module's typical norm."""

    blocks: list[Blocks]
    inner: list[Tensor]
    null: list[Tensor]


def _turned(pair: Pair, side: str) -> Pair:
    """The pair of W, or of its transpose when the input side is looked at."""
    B, A = pair
    return pair if side == "output" else (A.mT.contiguous(), B.mT.contiguous())


def solve(
    source: Source,
    shares: Tensor,
    target_rank: int | None,
    options: ClairOptions,
    verdict: Callable[[Judgement], Tensor] | None = None,
    trusted: Tensor | None = None,
    held: Callable[[Tensor], Tensor] | None = None,
) -> Solution:
    """CLAIR on K clients. shares: (K,) weights in the mean, summing to 1. target_rank: of the global update; None: the
    factors' own. verdict: (K,) bool, who is flagged on this evidence; default the judgement's own flags. trusted: (K,)
    in [0, 1], what evidence of another kind leaves of each client's influence in this round; default all. held: from
    the (K,) weights in the mean to those that limits leave, summing to 1 as well; default as they are.

    Raises UpdateError for fewer than 3 clients and for values that are not finite, ConfigError for a rank that the
    cohort cannot carry. Warns (ConvergenceWarning) when the solver stops at `max_iter` and clients are judged by it.
    """
    if len(shares) < LEAST_CLIENTS:
        raise UpdateError(f"{len(shares)} clients: clair needs at least {LEAST_CLIENTS}; use product_mean for fewer")
    seen = look(source, options, None)
    if options.center:
        seen = _Seen(look(source, options, _common(source, seen, options)).blocks, seen.inner, seen.null)
    inner = pooled(seen.inner)
    alive = _alive(inner)
    judgement, fit = _judged(seen, inner, alive, options)
    flagged = judgement.flagged if verdict is None else verdict(judgement)
    collaborative = alive & ~flagged
    if not bool(collaborative.any()):  # every update is zero, or too few are not: there is no evidence on anyone
        collaborative = torch.ones_like(alive)
    # Whoever its own evidence of this round speaks against counts for nothing in it, whatever its past says.
    counted = collaborative & ~judgement.flagged
    counted = counted if trusted is None else counted & (trusted > 0)
    counted = counted if bool(counted.any()) else collaborative
    weights = _weights(fit, alive, counted) * counted_once(cosines(inner))
    counts = influence(shares, counted, judgement, seen.inner, options, trusted)
    counts = counts if held is None else replace(counts, shares=held(counts.shares))

    def fitted(m: int) -> ModuleFit:
        module, clips = source.modules[m], counts.clips[m]
        return _fit_module(source, module, seen.blocks[m], weights, counts.shares, clips, target_rank, options).cpu()

    found = side_by_side(fitted, range(len(source.modules)), source.large)
    fits = dict(zip(source.modules, found, strict=True))
    scores = _module_scores(source.modules, seen, fit, alive)
    if fit is None:
        return Solution(judgement, flagged, weights, counts.shares, counts.kept, scores, fits, 0, True)
    # Where clients share no subspace, weights may circle among equals, and nobody is judged by them.
    if not fit.converged and not bool(judgement.thresholds["subspace"].isnan().all()):
        warnings.warn(
            f"clair stopped at max_iter={options.max_iter} before weights settled to tol={options.tol}; "
            "raise max_iter or tol",
            ConvergenceWarning,
            stacklevel=3,
        )
    return Solution(judgement, flagged, weights, counts.shares, counts.kept, scores, fits, fit.n_iter, fit.converged)


def look(source: Source, options: ClairOptions, common: Mapping[str, Pair] | None) -> _Seen:
    blocks, products, nulls = [], [], []

    def summary(module: str) -> tuple[Blocks, Tensor, Tensor]:
        B, A = _turned(source.change(module), options.side)
        if common is not None:
            B, A = _less(B, A, common[module])
        return summarise(B, A, keep=not options.center)

    summaries = side_by_side(summary, source.modules, source.large)
    for module, (found, inner, null) in zip(source.modules, summaries, strict=True):
        if not bool(torch.isfinite(inner.diag()).all()):
            k = int((~torch.isfinite(inner.diag())).nonzero()[0])
            raise UpdateError(f"{module}: the update of client {k} is not finite; leave it out or quarantine it")
        typical = found.energy[found.energy > 0]
        blocks.append(found)
        unit = float(typical.median()) if len(typical) else 1.0
        products.append(inner / unit)
        nulls.append(null / unit)
    limit = options.rank_limit
    if limit is not None:
        room = min(min(b.out, (b.coords.shape[0] - 1) * b.coords.shape[2]) for b in blocks)
        if limit > room:
            raise ConfigError(f"rank={limit}: these updates leave room for {room}; lower it or leave it 'auto'")
    return _Seen(blocks, products, nulls)


def _less(B: Tensor, A: Tensor, common: Pair) -> Pair:
    """Every W_k - M, of rank r + rank(M)."""
    K = len(B)
    minus, M = -common[0].to(B), common[1].to(A)
    return torch.cat([B, minus.expand(K, -1, -1)], dim=2), torch.cat([A, M.expand(K, -1, -1)], dim=1)


def _common(source: Source, seen: _Seen, options: ClairOptions) -> dict[str, Pair]:
    """The common component of each module: the mean of the consensus core, cut to four times the clients' rank."""
    agreed = consensus(cosines(pooled(seen.inner)))
    shares = torch.zeros(len(seen.inner[0]), dtype=torch.float64).index_fill(0, agreed.core, 1 / len(agreed.core))
    means = {}
    for module in source.modules:
        B, A = _turned(source.change(module), options.side)
        means[module] = refine.mean_update(B, A, shares, min(B.shape[1], A.shape[2], 4 * A.shape[1]), 0)[0]
    return means


def _alive(inner: Tensor) -> Tensor:
    """(K,) bool: the update is not zero next to the typical one."""
    norm = inner.diag().clamp_min(0).sqrt()
    return (norm > 0) & (norm > NOTHING * norm.median())


def _judged(seen: _Seen, inner: Tensor, alive: Tensor, options: ClairOptions) -> tuple[Judgement, Fit | None]:
    index = alive.nonzero().squeeze(1)
    if len(index) < LEAST_CLIENTS:
        return unjudged(inner, alive), None
    blocks = [replace(b, coords=b.coords[index], energy=b.energy[index]) for b in seen.blocks]
    agreed = consensus(independent(cosines(inner[index][:, index])))
    overlap = torch.stack([affinity(b.coords).double() for b in blocks]).sum(0)
    limit = min(options.rank_limit or MAX_RANK, MAX_RANK)
    starts = [agreed.core, consensus(overlap).core]
    if options.solver == "convex":
        fit = _convex(blocks, limit, options)
    else:
        fit = best_anchored(blocks, starts, limit, options)
    return judge(inner, torch.stack(seen.null).sum(0), agreed, alive, fit, blocks, options.center), fit


def _convex(blocks: list[Blocks], limit: int, options: ClairOptions) -> Fit:
    """Weights from the convex programme: a client counts by the share of its norm that is not in S."""
    everyone = torch.ones(len(blocks[0].coords), dtype=torch.float64)
    ranks = fixed_weights(blocks, everyone, limit).ranks
    found = admm.split(blocks, max(ranks), max(options.max_iter, admm.STEPS), options.tol * 1e-2)
    fit = fixed_weights(blocks, (1 - found.sparse).clamp_min(OUTSIDE), limit)
    return replace(fit, n_iter=found.n_iter, converged=found.converged)


def _weights(fit: Fit | None, alive: Tensor, collaborative: Tensor) -> Tensor:
    """(K,) of the final subspace: inverse residuals over the collaborative clients, largest 1."""
    weights = torch.zeros(len(alive), dtype=torch.float64)
    weights[alive] = 1.0 if fit is None else 1 / fit.residual.clamp_min(1e-3)
    weights = torch.where(collaborative, weights, 0.0)
    top = float(weights.max())
    return weights / top if top > 0 else weights


def _fit_module(
    source: Source,
    module: str,
    blocks: Blocks,
    weights: Tensor,
    shares: Tensor,
    clips: Tensor,
    target_rank: int | None,
    options: ClairOptions,
) -> ModuleFit:
    B, A = _turned(source.change(module), options.side)
    d, r = blocks.coords.shape[1:]
    rank = options.rank_limit
    if rank is None:
        energy = held_out_energies(blocks.coords, weights, min(MAX_RANK, d))
        rank = shared_rank(energy[weights > OUTSIDE].double(), blocks.out) if bool((weights > OUTSIDE).any()) else 1
    scaled = blocks.coords * weights.sqrt().to(blocks.coords)[:, None, None]
    values, vectors = torch.linalg.eigh(flat(scaled) @ flat(scaled).T)
    spectrum = values.flip(0)[: refine.SPECTRUM].clamp_min(0).double() / weights.sum().clamp_min(1e-300)
    places = min(blocks.out, int((weights > 0).sum()) * r)
    wide = min(d, max(rank, min(2 * r, places // 4))) if options.refine == "soft" else rank
    start = vectors[:, -wide:].flip(1)
    unit = torch.where(blocks.energy > 0, weights / blocks.energy.clamp_min(1e-300), 0.0)
    if blocks.inward is not None and blocks.grams is not None:
        start = blocks.inward @ start.to(blocks.inward)
        subspace = refine.leading_by_grams(flat(B), blocks.grams, unit, start[:, :rank])
        start = flat(B) @ start if options.refine == "soft" else start
    else:
        start = start if blocks.basis is None else blocks.basis @ start.to(blocks.basis)
        subspace = (
            refine.leading(B, A, unit, start[:, :rank])[1]
            if not options.center
            else refine.signed(start[:, :rank].double())
        )

    if not source.restarted:
        B, A = _turned(source.whole(module), options.side)
    target = min(target_rank or A.shape[1], B.shape[1], A.shape[2])
    extra = max(B.shape[1], A.shape[2]) if options.exact else rank
    grams = blocks.grams if source.restarted else None
    mean, total = _mean(source, module, (B, A), shares, clips, target, extra, options.side, grams)
    gains = torch.ones(rank, dtype=torch.float64)
    if options.refine == "soft":
        between = mean
        if _taken(shares, clips):  # the scatter of the clipped changes: the start, common to all, drops out of it
            B, A = _turned(source.change(module), options.side)
            B = B * clips.to(B)[:, None, None]
            between = refine.mean_update(B, A, shares, target, extra)[0]
        subspace, gains = _soft(B, A, shares, start, between)
    return ModuleFit(subspace, spectrum, gains, mean, total)


def _taken(shares: Tensor, clips: Tensor) -> float:
    """The share of the mean that the clips take from the clients' changes."""
    return float((shares * (1 - clips)).sum())


def _mean(
    source: Source,
    module: str,
    whole: Pair,
    shares: Tensor,
    clips: Tensor,
    rank: int,
    extra: int,
    side: str,
    grams: Grams | None,
) -> tuple[Pair, lowrank.LowRank]:
    """`refine.mean_update` of start + clip * change of every client: the start stands in for what the clips take."""
    taken = _taken(shares, clips)
    weights = shares * clips
    if taken > 0 and not source.restarted:
        whole, weights = _turned(source.with_start(module), side), torch.cat([weights, weights.new_tensor([taken])])
    return refine.mean_update(*whole, weights, rank, extra, grams)


def _soft(B: Tensor, A: Tensor, shares: Tensor, start: Tensor, mean: Pair) -> Pair:
    """(directions, gains) of the between-client scatter, unbiased for weighted clients."""
    values, subspace = refine.leading(B, A, shares, start, mean, steps=6)
    energy = torch.einsum("k,kab,kab->", shares.to(B), A @ A.mT, B.mT @ B)
    total = float(energy) - float(((mean[0].T @ mean[0]) * (mean[1] @ mean[1].T)).sum())
    places = min(B.shape[1], int((shares > 0).sum()) * A.shape[1])
    return subspace, refine.soft_gains(values, total, places)


def _module_scores(modules: Sequence[str], seen: _Seen, fit: Fit | None, alive: Tensor) -> dict[str, dict[str, Tensor]]:
    """The three scores of each module by itself, as the pooled ones are defined; 0 where a module shares nothing."""
    index = alive.nonzero().squeeze(1)
    scores: dict[str, dict[str, Tensor]] = {}
    for m, module in enumerate(modules):
        zero = torch.zeros(len(alive), dtype=torch.float64)
        scores[module] = {"subspace": zero, "direction": zero, "scale": zero}
        if fit is None:
            continue
        level = float(fit.gains[m][fit.kept].median())
        agreed = consensus(cosines(seen.inner[m][index][:, index]))
        norm = seen.inner[m].diag().clamp_min(0).sqrt()
        scores[module] = {
            "subspace": zero.index_copy(0, index, 1 - fit.gains[m] / level) if level > 0 else zero,
            "direction": zero.index_copy(0, index, 1 - agreed.to_core / agreed.agreement)
            if agreed.agreement > 0
            else zero,
            "scale": (norm / norm[alive].median()).clamp(1e-6, 1e6).log(),
        }
    return scores


def refined(fit: ModuleFit, pair: Pair, options: ClairOptions, rank: int) -> lowrank.LowRank:
    """A client's refined update of one module from its own pair (B, A), float64: cut to `rank` with what that
    discards, or whole when `options.exact`."""
    turned = _turned((pair[0][None].to(fit.subspace.device), pair[1][None].to(fit.subspace.device)), options.side)
    B, A = fit.refined(*(part[0] for part in turned))
    low = lowrank.LowRank(B, A, B.new_zeros(0), 0.0) if options.exact else lowrank.truncate(B, A, rank)
    return low if options.side == "output" else low._replace(B=low.A.mT, A=low.B.mT)
