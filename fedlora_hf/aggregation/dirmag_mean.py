"""dirmag_mean: magnitudes and directions of A and of B averaged apart, directions re-normalised."""
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass

import torch

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.method import Method
from fedlora_hf.errors import ConfigError
from fedlora_hf.numerics.direction import Axis, mean_components
from fedlora_hf.update import AdapterState, Aggregate, LoraFactors


@dataclass(frozen=True)
class DirMagMeanOptions:
    """axis_a, axis_b: "row" or "column", what a magnitude belongs to; the adapters' own (DirMagLoraConfig) is best."""

    axis_a: Axis = "row"
    axis_b: Axis = "row"

    def __post_init__(self) -> None:
        for name in ("axis_a", "axis_b"):
            if getattr(self, name) not in ("row", "column"):
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be 'row' or 'column'; choose one of these")


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


METHOD = Method(
    name="dirmag_mean",
    title="Component-wise mean of magnitudes and directions",
    paper="the components of FedLoRA-Optimizer, Zhao et al. 2025 (arXiv 2510.11274); the mean is our choice",
    averages="factors",
    rule=dirmag_mean,
    options=DirMagMeanOptions,
)
