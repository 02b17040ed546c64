"""trimmed_mean: coordinate-wise mean of the updates W_k without the extremes, cut to the target rank."""
# SPDX-License-Identifier: Apache-2.0

from functools import partial

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.shared import coordinatewise
from fedlora_hf.methods.robust import TrimmedMeanOptions
from fedlora_hf.numerics import means
from fedlora_hf.update import Aggregate


def trimmed_mean(cohort: Cohort, options: TrimmedMeanOptions) -> Aggregate:
    """W[i, j] = mean of W_k[i, j] without the floor(trim K) smallest and largest. Every client counts once."""
    K = len(cohort.ids)
    count = int(options.trim * K + 1e-9)  # 0.29 * 100 is 28.99...
    state, modules = coordinatewise(cohort, partial(means.trimmed_mean, count=count))
    return Aggregate(state, weights=dict.fromkeys(cohort.ids, 1 / K), modules=modules)
