"""Intervals by bootstrap: how far a mean would move were other examples, or other groups of them, drawn."""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Sequence

import torch

DRAWS = 2000


def bootstrap(
    values: Sequence[float],
    seed: int,
    *,
    weights: Sequence[float] | None = None,
    groups: Sequence[int] | None = None,
    level: float = 0.95,
) -> tuple[float, float]:
    """(low, high) of the mean of `values`: percentiles of 2,000 means of as many values drawn with replacement (Efron
    1979).

    weights: what each value counts (tokens of an example, say), default 1. groups: which values belong together (a
    number each, equal numbers are one group); whole groups are then drawn. seed: of a generator of its own.
    (nan, nan) without values; one value, or one group, has no spread: low = high = the mean.
    """
    if not values:
        return math.nan, math.nan
    given = torch.tensor(list(values), dtype=torch.float64)
    counts = torch.ones_like(given) if weights is None else torch.tensor(list(weights), dtype=torch.float64)
    names = torch.arange(len(given)) if groups is None else torch.tensor(list(groups)).unique(return_inverse=True)[1]
    size = int(names.max()) + 1
    top = torch.zeros(size, dtype=torch.float64).index_add(0, names, given * counts)
    below = torch.zeros(size, dtype=torch.float64).index_add(0, names, counts)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(size, (DRAWS, size), generator=generator)
    means = top[drawn].sum(1) / below[drawn].sum(1)
    ends = torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))
    return float(ends[0]), float(ends[1])
