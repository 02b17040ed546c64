"""A global adapter of which clients train the first rows and the rest stands frozen under these (fedex).

Both are one stock adapter, so that what a run leaves behind loads and merges anywhere, exactly.
"""
# SPDX-License-Identifier: Apache-2.0

import torch

from fedlora_hf.numerics import lowrank
from fedlora_hf.update import AdapterState, LoraFactors

# Singular values below this share of the largest are rounding of float32 factors.
ROUNDING = 1e-7


def split(state: AdapterState, initial: AdapterState) -> tuple[AdapterState, AdapterState | None]:
    """(what clients train, of the ranks of `initial`; what stands under it, None where there is nothing)."""
    first, rest = {}, {}
    for module, factors in state.items():
        rank = initial[module].rank
        first[module] = LoraFactors(factors.A[:rank], factors.B[:, :rank], factors.scale)
        rest[module] = LoraFactors(factors.A[rank:], factors.B[:, rank:], factors.scale)
    some = any(factors.rank for factors in rest.values())
    return AdapterState(first, state.extras), AdapterState(rest, {}) if some else None


def grown(before: AdapterState, now: AdapterState, initial: AdapterState) -> AdapterState:
    """`now`, whose first rows clients train next, with what stood frozen before added to what stands frozen.

    Exact: what is frozen gets no more rank than min(out, in), which any matrix of that shape has.
    """
    first, rest = split(now, initial)
    under = split(before, initial)[1]
    if under is None:
        return now
    state = {}
    for module, factors in first.items():
        parts = [under[module]] + ([] if rest is None else [rest[module]])
        frozen = _sum([part for part in parts if part.rank], factors)
        A, B = torch.cat([factors.A, frozen.A]), torch.cat([factors.B, frozen.B], dim=1)
        state[module] = LoraFactors(A, B, factors.scale)
    return AdapterState(state, now.extras)


def _sum(parts: list[LoraFactors], like: LoraFactors) -> LoraFactors:
    """The exact sum, written with the scale of `like`, of rank at most min(out, in)."""
    if not parts:
        return LoraFactors(like.A[:0], like.B[:, :0], like.scale)
    rank = min(*like.shape, sum(part.rank for part in parts))
    low = lowrank.mean_truncated([(part.B, part.A) for part in parts], [part.scale for part in parts], rank)
    rank = int((low.spectrum[:rank] > ROUNDING * low.spectrum[0]).sum())
    return LoraFactors.from_low_rank(
        lowrank.LowRank(low.B[:, :rank], low.A[:rank], low.spectrum, 0.0), rank, like.scale
    )
