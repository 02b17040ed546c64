"""What several methods do with a cohort: fit a rank, describe a module, mean or combine products, compare clients."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.stacks import Stack, Stacks
from fedlora_hf.numerics import lowrank, many
from fedlora_hf.update import AdapterState, LoraFactors
from fedlora_hf.util.side_by_side import side_by_side

# Singular values kept per module in the record.
SPECTRUM = 32
# Numbers in the one block of rows that a coordinate-wise statistic has in K copies (64 MiB in float64).
BLOCK = 2**23

ModuleInfo = dict[str, dict[str, Any]]
Written = tuple[LoraFactors, dict[str, Any]]


def described(low: lowrank.LowRank, rank: int) -> dict[str, Any]:
    """One module's entry in `Aggregate.modules`, plain numbers: discarded energy is a share of the squared norm."""
    return {"rank": rank, "spectrum": low.spectrum[:SPECTRUM].cpu().tolist(), "discarded_energy": low.discarded}


def fitted(factors: LoraFactors, target_rank: int | None) -> tuple[LoraFactors, dict[str, Any]]:
    """(the factors, best-truncated where `target_rank` is below their rank, the module's entry for the record)."""
    rank = factors.rank if target_rank is None else min(target_rank, factors.rank)
    cut = rank < factors.rank
    low = lowrank.mean_truncated([(factors.B, factors.A)], [factors.scale], rank if cut else min(rank, SPECTRUM))
    if cut:
        return LoraFactors.from_low_rank(low, rank, factors.scale), described(low, rank)
    return factors, described(low._replace(discarded=0.0), rank)


def weighted_products(cohort: Cohort, weights: Mapping[str, float]) -> tuple[AdapterState, ModuleInfo]:
    """sum_k weights[k] W_k, exactly, re-factored to the cohort's rank; modules_to_save tensors are averaged alike."""

    def mean(module: str) -> Written:
        rank, scale = cohort.rank(module), cohort.scale(module)
        kept = [(f, weights[k]) for k, f in zip(cohort.ids, cohort.factors(module), strict=True) if weights[k]]
        low = lowrank.mean_truncated([(f.B, f.A) for f, _ in kept], [weight * f.scale for f, weight in kept], rank)
        return LoraFactors.from_low_rank(low, rank, scale), described(low, rank)

    if cohort.several is not None:
        found = _weighted_stacks(cohort, cohort.several, weights)
    else:
        found = dict(zip(cohort.modules, side_by_side(mean, cohort.modules, cohort.large), strict=True))
    state = AdapterState({module: factors for module, (factors, _) in found.items()}, cohort.mean_extras(weights))
    return state, {module: info for module, (_, info) in found.items()}


def _weighted_stacks(cohort: Cohort, stacks: Stacks, weights: Mapping[str, float]) -> dict[str, Written]:
    """The same from stacks of several modules, on their device."""
    found: dict[str, Written] = {}
    share = torch.tensor([weights[k] for k in cohort.ids], dtype=torch.float64)
    kept = share.nonzero().squeeze(1)
    for group in stacks.groups:
        stack = stacks.stacked(group)
        if len(kept) < len(share):
            stack = Stack(*(part.index_select(1, kept.to(part.device)) for part in stack))
        stack = stack._replace(scales=stack.scales * share[kept].to(stack.scales.device))
        B, A = stack.pair(torch.float64)
        lows = many.means_truncated(B.movedim(1, 2).flatten(2), A.flatten(1, 2), cohort.rank(group[0]))
        for module, low in zip(group, lows, strict=True):
            rank = cohort.rank(module)
            found[module] = LoraFactors.from_low_rank(low, rank, cohort.scale(module)), described(low, rank)
    return {module: found[module] for module in cohort.modules}


def coordinatewise(cohort: Cohort, statistic: Callable[[Tensor], Tensor]) -> tuple[AdapterState, ModuleInfo]:
    """A statistic over clients, (K, ...) -> (...), of each entry of W_k, cut to the cohort's rank.

    The products are formed for one block of rows at a time; only the result is ever a whole (out, in) matrix.
    """
    state, info = {}, {}
    for module in cohort.modules:
        factors, rank, scale = cohort.factors(module), cohort.rank(module), cohort.scale(module)
        B, A = lowrank.stacked([(f.B, f.A) for f in factors])
        B *= torch.tensor([f.scale for f in factors], dtype=torch.float64).to(B)[:, None, None]
        rows = max(1, BLOCK // (len(factors) * A.shape[2]))
        W = torch.cat([statistic(block.mT @ A) for block in B.split(rows, dim=2)])
        low = lowrank.truncate_dense(W, rank)
        state[module], info[module] = LoraFactors.from_low_rank(low, rank, scale), described(low, rank)
    extras = {}
    for name in cohort.extras:
        values = [update.state.extras[name].double() for update in cohort.updates]
        extras[name] = statistic(torch.stack(values)).float()
    return AdapterState(state, extras), info


def gram(cohort: Cohort) -> Tensor:
    """(K, K) float64: <w_j, w_k> of whole updates, all modules together, from the factors (extras left out)."""
    total = torch.zeros(len(cohort.updates), len(cohort.updates), dtype=torch.float64)
    if cohort.several is not None:
        for group in cohort.several.groups:
            for B, A in zip(*cohort.several.stacked(group).pair(torch.float64), strict=True):
                total += lowrank.stacked_products((B.mT, A)).cpu()
        return total
    for module in cohort.modules:
        factors = cohort.factors(module)
        scales = torch.tensor([f.scale for f in factors], dtype=torch.float64)
        total += lowrank.inner_products([(f.B, f.A) for f in factors]).cpu() * scales[:, None] * scales
    return total
