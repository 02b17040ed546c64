"""stacking: the exact weighted sum of the updates as concatenated factors; the rank grows to the sum of the ranks."""
# SPDX-License-Identifier: Apache-2.0

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.shared import fitted
from fedlora_hf.methods.method import NoOptions
from fedlora_hf.numerics import lowrank
from fedlora_hf.update import AdapterState, Aggregate, LoraFactors


def stacked_factors(cohort: Cohort, module: str) -> LoraFactors:
    """A = [A_1; ...; A_K] and B = [p_1 s_1 B_1, ..., p_K s_K B_K] / s: rank sum r_k, nothing lost."""
    scale, clients = cohort.scale(module), cohort.factors(module)
    weights = [cohort.weights[k] * f.scale / scale for k, f in zip(cohort.ids, clients, strict=True)]
    B, A = lowrank.concatenated([(f.B, f.A) for f in clients], weights)
    return LoraFactors(A.float(), B.float(), scale)


def stacking(cohort: Cohort, options: NoOptions) -> Aggregate:
    """sum_k p_k W_k without any re-factoring, unless a lower target rank was asked for."""
    state, modules = {}, {}
    for module in cohort.modules:
        state[module], modules[module] = fitted(stacked_factors(cohort, module), cohort.target_rank)
    return Aggregate(AdapterState(state, cohort.mean_extras()), weights=dict(cohort.weights), modules=modules)
