"""The second reading: every module's shared subspace and robust mean, from weights that all modules have together."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedlora_hf.methods.clair import ClairOptions
from fedlora_hf.numerics.clair import refine
from fedlora_hf.numerics.clair.blocks import Blocks, Grams, flat
from fedlora_hf.numerics.clair.influence import Influence
from fedlora_hf.numerics.clair.refine import ModuleFit, Pair
from fedlora_hf.numerics.clair.source import Key, Source, keys_of, names, turned
from fedlora_hf.numerics.clair.subspace import MAX_RANK, OUTSIDE, each, held_out_energies, scatter, shared_rank
from fedlora_hf.util.side_by_side import side_by_side


class Plan(NamedTuple):
    """What a module's coordinates say. rank: of its subspace. spectrum: of the mean scatter. start: (d, q >= rank)
    leading directions, in coordinates. unit: (K,) weights of the clients' updates as they are."""

    rank: int
    spectrum: Tensor
    start: Tensor
    unit: Tensor


def fitted(
    source: Source,
    blocks: Sequence[Blocks],
    weights: Tensor,
    counts: Influence,
    target_rank: int | None,
    options: ClairOptions,
) -> dict[str, ModuleFit]:
    """{module: its fit, on the CPU}, modules in order; `blocks` are those of the first reading, in the same order."""
    place = {module: m for m, module in enumerate(source.modules)}

    def planned(m: int) -> Plan:
        return _planned(blocks[m], weights, options)

    def worked(key: Key) -> list[ModuleFit]:
        if isinstance(key, str):
            m = place[key]
            plan = planned(m)
            return [_fit_module(source, key, blocks[m], plan, counts.shares, counts.clips[m], target_rank, options)]
        rows = [place[name] for name in key]
        of_key, clips = [blocks[m] for m in rows], counts.clips[rows]
        return _fit_modules(source, key, of_key, [plans[m] for m in rows], counts.shares, clips, target_rank, options)

    keys = keys_of(source, options)
    if not all(isinstance(key, str) for key in keys):
        plans = dict(enumerate(each(blocks, lambda m, _: planned(m))))
    found = zip(keys, side_by_side(worked, keys, source.large), strict=True)
    fits = {module: fit for key, of_key in found for module, fit in zip(names(key), of_key, strict=True)}
    return {module: fits[module].cpu() for module in source.modules}


def _planned(blocks: Blocks, weights: Tensor, options: ClairOptions) -> Plan:
    d, r = blocks.coords.shape[1:]
    rank, (values, vectors) = options.rank_limit, scatter(blocks.coords, weights)
    if rank is None:
        energy = held_out_energies(blocks.coords, weights, min(MAX_RANK, d), (values, vectors))
        rank = shared_rank(energy[weights > OUTSIDE].double(), blocks.out) if bool((weights > OUTSIDE).any()) else 1
    spectrum = values.flip(0)[: refine.SPECTRUM].clamp_min(0).double() / weights.sum().clamp_min(1e-300)
    places = min(blocks.out, int((weights > 0).sum()) * r)
    wide = min(d, max(rank, min(2 * r, places // 4))) if options.refine == "soft" else rank
    unit = torch.where(blocks.energy > 0, weights / blocks.energy.clamp_min(1e-300), 0.0)
    return Plan(rank, spectrum, vectors[:, -wide:].flip(1), unit)


def _start(blocks: Blocks, plan: Plan) -> Tensor:
    """The plan's directions where the factors are: as columns of flat(B) where Gram matrices are kept, else of W."""
    basis = blocks.inward if blocks.inward is not None else blocks.basis
    return plan.start if basis is None else basis @ plan.start.to(basis)


def _fit_module(
    source: Source,
    module: str,
    blocks: Blocks,
    plan: Plan,
    shares: Tensor,
    clips: Tensor,
    target_rank: int | None,
    options: ClairOptions,
) -> ModuleFit:
    B, A = turned(source.change(module), options.side)
    rank, start = plan.rank, _start(blocks, plan)
    if blocks.grams is not None:
        subspace = refine.leading_by_grams(flat(B), blocks.grams, plan.unit, start[:, :rank])
        start = flat(B) @ start if options.refine == "soft" else start
    else:
        subspace = (
            refine.leading(B, A, plan.unit, start[:, :rank])[1]
            if not options.center
            else refine.signed(start[:, :rank].double())
        )

    if not source.restarted:
        B, A = turned(source.whole(module), options.side)
    target = min(target_rank or A.shape[1], B.shape[1], A.shape[2])
    extra = max(B.shape[1], A.shape[2]) if options.exact else rank
    grams = blocks.grams if source.restarted else None
    whole, wanted = _started(source, module, (B, A), shares, clips, options.side)
    mean, total = refine.mean_update(*whole, wanted, target, extra, grams)
    gains = torch.ones(rank, dtype=torch.float64)
    if options.refine == "soft":
        between = mean
        if _taken(shares, clips):  # the scatter of the clipped changes: the start, common to all, drops out of it
            B, A = turned(source.change(module), options.side)
            B = B * clips.to(B)[:, None, None]
            between = refine.mean_update(B, A, shares, target, extra)[0]
        subspace, gains = _soft(B, A, shares, start, between)
    return ModuleFit(subspace, plan.spectrum, gains, mean, total)


def _fit_modules(
    source: Source,
    key: tuple[str, ...],
    blocks: Sequence[Blocks],
    plans: Sequence[Plan],
    shares: Tensor,
    clips: Tensor,
    target_rank: int | None,
    options: ClairOptions,
) -> list[ModuleFit]:
    """`_fit_module` of several modules at once; clips: (M, K). Ranks may differ: columns of zeros stay so."""
    B, A = turned(source.change(key), options.side)
    rank, unit = max(plan.rank for plan in plans), torch.stack([plan.unit for plan in plans])
    starts = [_start(own, plan).to(B) for own, plan in zip(blocks, plans, strict=True)]
    start = torch.stack([pad(own, (0, rank - own.shape[1])) for own in starts])
    if all(own.grams is not None for own in blocks):
        kept = [own.grams for own in blocks if own.grams is not None]
        grams = Grams(*(torch.stack(parts) for parts in zip(*kept, strict=True)))
        subspaces = refine.leading_by_grams(flat(B), grams, unit, start)
    else:
        subspaces = refine.leading(B, A, unit, start)[1]
    if not source.restarted:
        B, A = turned(source.whole(key), options.side)
    target = min(target_rank or A.shape[-2], B.shape[-2], A.shape[-1])
    whole, wanted = _started(source, key, (B, A), shares, clips, options.side)
    means = refine.mean_updates(*whole, wanted, target, rank)
    fits = []
    for subspace, plan, ((left, right), total) in zip(subspaces.cpu(), plans, means, strict=True):
        own, more = plan.rank, target + plan.rank
        gains = torch.ones(own, dtype=torch.float64)
        fits.append(ModuleFit(subspace[:, :own], plan.spectrum, gains, (left[:, :more], right[:more]), total))
    return fits


def _taken(shares: Tensor, clips: Tensor) -> float:
    """The largest share of a mean that the clips take from the clients' changes."""
    return float((shares * (1 - clips)).sum(-1).max())


def _started(source: Source, key: Key, whole: Pair, shares: Tensor, clips: Tensor, side: str) -> tuple[Pair, Tensor]:
    """What the mean is of, and its weights: start + clip * change of every client. The start stands in for what the
    clips take."""
    weights = shares * clips
    if source.restarted or not _taken(shares, clips) > 0:
        return whole, weights
    taken = (shares * (1 - clips)).sum(-1, keepdim=True)
    return turned(source.with_start(key), side), torch.cat([weights, taken], dim=-1)


def _soft(B: Tensor, A: Tensor, shares: Tensor, start: Tensor, mean: Pair) -> Pair:
    """(directions, gains) of the between-client scatter, unbiased for weighted clients."""
    values, subspace = refine.leading(B, A, shares, start, mean, steps=6)
    energy = torch.einsum("k,kab,kab->", shares.to(B), A @ A.mT, B.mT @ B)
    total = float(energy) - float(((mean[0].T @ mean[0]) * (mean[1] @ mean[1].T)).sum())
    places = min(B.shape[1], int((shares > 0).sum()) * A.shape[1])
    return subspace, refine.soft_gains(values, total, places)
