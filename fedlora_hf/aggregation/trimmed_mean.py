"""trimmed_mean: coordinate-wise mean of the updates W_k without the extremes, cut to the target rank."""
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass
from functools import partial

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.method import Method
from fedlora_hf.aggregation.shared import coordinatewise
from fedlora_hf.errors import ConfigError
from fedlora_hf.numerics import means
from fedlora_hf.update import Aggregate


@dataclass(frozen=True)
class TrimmedMeanOptions:
    """trim: share of the clients dropped at each end of every coordinate (rounded down to whole clients)."""

    trim: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.trim < 0.5:
            raise ConfigError(f"trim={self.trim}: must be at least 0 and below 0.5; choose 0.25 for instance")


def trimmed_mean(cohort: Cohort, options: TrimmedMeanOptions) -> Aggregate:
    """W[i, j] = mean of W_k[i, j] without the floor(trim K) smallest and largest. Every client counts once."""
    K = len(cohort.ids)
    count = int(options.trim * K + 1e-9)  # 0.29 * 100 is 28.99...
    state, modules = coordinatewise(cohort, partial(means.trimmed_mean, count=count))
    return Aggregate(state, weights=dict.fromkeys(cohort.ids, 1 / K), modules=modules)


METHOD = Method(
    name="trimmed_mean",
    title="Coordinate-wise trimmed mean of the products",
    paper="Yin et al. 2018 (arXiv 1803.01498), on products",
    averages="product",
    rule=trimmed_mean,
    options=TrimmedMeanOptions,
    robust=True,
    weighted=False,
)
