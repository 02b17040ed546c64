"""CLAIR over modules that are read one at a time: one pass to see, the solver on what was kept, one pass to refine."""
# SPDX-License-Identifier: Apache-2.0

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlora_hf.errors import ConfigError, ConvergenceWarning, UpdateError
from fedlora_hf.methods.clair import LEAST_CLIENTS, ClairOptions
from fedlora_hf.numerics import lowrank
from fedlora_hf.numerics.clair import admm, refine
from fedlora_hf.numerics.clair.blocks import Blocks, affinity, summarise
from fedlora_hf.numerics.clair.consensus import consensus, cosines, counted_once, independent, pooled
from fedlora_hf.numerics.clair.evidence import Judgement, judge, unjudged
from fedlora_hf.numerics.clair.fits import fitted
from fedlora_hf.numerics.clair.influence import influence
from fedlora_hf.numerics.clair.refine import ModuleFit, Pair
from fedlora_hf.numerics.clair.source import Key, Source, keys_of, names, turned
from fedlora_hf.numerics.clair.subspace import (
    MAX_RANK,
    OUTSIDE,
    Fit,
    best_anchored,
    each,
    fixed_weights,
)
from fedlora_hf.util.side_by_side import side_by_side

# A norm below this share of the typical one is a zero update.
NOTHING = 1e-6


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

    fits = fitted(source, seen.blocks, weights, counts, target_rank, options)
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
    """One pass over all modules. common: {module: a component to take off every update first}; None: nothing."""
    blocks, products, nulls = [], [], []

    def summary(key: Key) -> list[tuple[Blocks, Tensor, Tensor]]:
        B, A = turned(source.change(key), options.side)
        if common is not None:
            B, A = _less(B, A, common[names(key)[0]])
        found = summarise(B, A, keep=not options.center)
        if isinstance(key, str):
            return [found]
        return list(zip(found[0].apart(len(key)), found[1], found[2], strict=True))

    keys = keys_of(source, options)
    of_keys = zip(keys, side_by_side(summary, keys, source.large), strict=True)
    summaries = {module: one for key, found in of_keys for module, one in zip(names(key), found, strict=True)}
    for module in source.modules:
        found, inner, null = summaries[module]
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
        B, A = turned(source.change(module), options.side)
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
    overlap = pooled(each(blocks, lambda _, own: affinity(own.coords)))
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
    one = turned((pair[0][None].to(fit.subspace.device), pair[1][None].to(fit.subspace.device)), options.side)
    B, A = fit.refined(*(part[0] for part in one))
    low = lowrank.LowRank(B, A, B.new_zeros(0), 0.0) if options.exact else lowrank.truncate(B, A, rank)
    return low if options.side == "output" else low._replace(B=low.A.mT, A=low.B.mT)
