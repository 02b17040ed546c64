"""product_mean: the exact weighted mean of the updates B A, re-factored to the target rank."""
# SPDX-License-Identifier: Apache-2.0

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.shared import weighted_products
from fedlora_hf.methods.method import NoOptions
from fedlora_hf.update import Aggregate


def product_mean(cohort: Cohort, options: NoOptions) -> Aggregate:
    """W = sum_k p_k s_k B_k A_k, cut to the target rank by the best approximation there is; what it loses is recorded.

    FlexLoRA forms each W (out, in) and hands every client an SVD of its own rank; here the mean is re-factored once,
    from the factors, for all [our re-factoring, same matrix].
    """
    state, modules = weighted_products(cohort, cohort.weights)
    return Aggregate(state, weights=dict(cohort.weights), modules=modules)
