"""geometric_median: the update nearest, in sum of distances, to all clients' updates W_k."""
# SPDX-License-Identifier: Apache-2.0

import warnings
from dataclasses import dataclass

import torch

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.counts import limited
from fedlora_hf.aggregation.method import Method
from fedlora_hf.aggregation.shared import gram, weighted_products
from fedlora_hf.errors import ConfigError, ConvergenceWarning
from fedlora_hf.numerics import means
from fedlora_hf.update import Aggregate


@dataclass(frozen=True)
class GeometricMedianOptions:
    """tolerance: change of the weights (sum of absolute values) that ends the iteration; max_iterations: its limit."""

    tolerance: float = 1e-8
    max_iterations: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:
            raise ConfigError(f"tolerance={self.tolerance}: must be above 0 and below 1; choose 1e-8 for instance")
        if self.max_iterations < 1:
            raise ConfigError(f"max_iterations={self.max_iterations}: must be at least 1; choose 1000 for instance")


def geometric_median(cohort: Cohort, options: GeometricMedianOptions) -> Aggregate:
    """argmin_W sum_k p_k ||W - W_k||_F over whole updates (all modules), a weighted mean sum_k c_k W_k.

    The weights c come from inner products of the factors alone; the mean is then re-factored to the target rank, and
    tensors trained whole are meaned with the same weights. Whoever's claim of examples was not believed is held to
    weight_cap times the median of c [our choice]: the median moves to where the most weight lies.
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


METHOD = Method(
    name="geometric_median",
    title="Geometric median of the products",
    paper="RFA, Pillutla et al. 2022 (arXiv 1912.13445), on products",
    averages="product",
    rule=geometric_median,
    options=GeometricMedianOptions,
    robust=True,
)
