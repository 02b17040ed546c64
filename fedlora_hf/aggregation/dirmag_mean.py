"""dirmag_mean: magnitudes and directions of A and of B averaged apart, directions re-normalised."""
# SPDX-License-Identifier: Apache-2.0

import torch

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.methods.means import DirMagMeanOptions
from fedlora_hf.numerics.direction import mean_components
from fedlora_hf.update import AdapterState, Aggregate, LoraFactors


def mean_factors(cohort: Cohort, module: str, options: DirMagMeanOptions) -> LoraFactors:
    """One module's mean. Scales are made equal first; lower ranks are zero-padded, and what is 0 has no direction."""
    scale = cohort.scale(module)
    clients = [factors.to(torch.float32).rescaled(scale) for factors in cohort.factors(module)]
    rank = max(factors.rank for factors in clients)
    pairs = [(padded.A, padded.B) for padded in (factors.padded(rank) for factors in clients)]
    weights = [cohort.weights[client_id] for client_id in cohort.ids]
    return LoraFactors(*mean_components(pairs, weights, options.axis_a, options.axis_b), scale)


def dirmag_mean(cohort: Cohort, options: DirMagMeanOptions) -> Aggregate:
    """m = sum_k p_k m_k and d = normalised(sum_k p_k d_k) for every row (or column) of A and of B."""
    state = {module: mean_factors(cohort, module, options) for module in cohort.modules}
    return Aggregate(AdapterState(state, cohort.mean_extras()), weights=dict(cohort.weights))
