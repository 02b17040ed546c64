"""median: coordinate-wise median of the updates W_k (not of the factors), cut to the target rank."""
# SPDX-License-Identifier: Apache-2.0

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.shared import coordinatewise
from fedlora_hf.methods.method import NoOptions
from fedlora_hf.numerics import means
from fedlora_hf.update import Aggregate


def median(cohort: Cohort, options: NoOptions) -> Aggregate:
    """W[i, j] = median_k W_k[i, j]. Every client counts once, whatever number of examples it claims, as in the paper.

    The median of low-rank matrices is not low-rank: `discarded_energy` says what the cut loses.
    """
    state, modules = coordinatewise(cohort, means.median)
    return Aggregate(state, weights={client_id: 1 / len(cohort.ids) for client_id in cohort.ids}, modules=modules)
