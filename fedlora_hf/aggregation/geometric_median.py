"""geometric_median: the update nearest, in sum of distances, to all clients' updates W_k."""
# SPDX-License-Identifier: Apache-2.0

import warnings

import torch

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.counts import limited
from fedlora_hf.aggregation.shared import gram, weighted_products
from fedlora_hf.errors import ConvergenceWarning
from fedlora_hf.methods.robust import GeometricMedianOptions
from fedlora_hf.numerics import means
from fedlora_hf.update import Aggregate


def geometric_median(cohort: Cohort, options: GeometricMedianOptions) -> Aggregate:
    """argmin_W sum_k p_k ||W - W_k||_F over whole updates (all modules), a weighted mean sum_k c_k W_k.

    The weights c come from inner products of the factors alone; the mean is then re-factored to the target rank, and
    PEFT's modules_to_save tensors are averaged with the same weights. A client whose claim of examples was not
    believed is held to weight_cap times the median of c [our choice]: the median moves to where the most weight lies.
    """
    shares = torch.tensor([cohort.weights[client_id] for client_id in cohort.ids], dtype=torch.float64)
    found = means.geometric_median(gram(cohort), shares, options.tolerance, options.max_iterations)
    if not found.converged:
        warnings.warn(
            f"geometric_median stopped at max_iterations={options.max_iterations} before tolerance="
            f"{options.tolerance:g}: the weights may still move; raise one of the two",
            ConvergenceWarning,
            stacklevel=2,
        )
    weights = limited(dict(zip(cohort.ids, found.weights.tolist(), strict=True)), cohort.weight_limits)
    state, modules = weighted_products(cohort, weights)
    return Aggregate(state, weights=weights, modules=modules, n_iter=found.n_iter, converged=found.converged)
