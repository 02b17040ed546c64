"""centred_clipping: a mean found in a few steps, each of them clipping what lies far from where it stands."""
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass

import torch

from fedlora_hf.aggregation import changes
from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.method import Method
from fedlora_hf.errors import ConfigError
from fedlora_hf.numerics import clipping
from fedlora_hf.update import Aggregate


@dataclass(frozen=True)
class CentredClippingOptions:
    """radius: tau, to which a distance from the centre is clipped, a Frobenius norm over all modules; default, in every
    step, the median distance [our choice]. steps: how often; the paper takes one to three."""

    radius: float | None = None
    steps: int = 3

    def __post_init__(self) -> None:
        if self.radius is not None and not 0 < self.radius < float("inf"):
            raise ConfigError(f"radius={self.radius}: must be above 0; leave it out for the median distance")
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps}: must be at least 1; choose 3 for instance")


def centred_clipping(cohort: Cohort, options: CentredClippingOptions) -> Aggregate:
    """V <- V + sum_k p_k (D_k - V) min(1, tau / ||D_k - V||), from V = 0, which is the round's start.

    Everything follows from inner products of the factors. The paper starts from the last round's momentum, clips
    clients' momenta and weighs clients alike: here the changes D_k, and `weight_by="uniform"` weighs them alike.
    """
    shares = torch.tensor([cohort.weights[client] for client in cohort.ids], dtype=torch.float64)
    found, radii = clipping.centred(changes.gram(cohort), shares, options.radius, options.steps)
    state, modules = changes.moved(cohort, dict(zip(cohort.ids, found.tolist(), strict=True)))
    total = float(found.sum())
    weights = dict(zip(cohort.ids, (found / total).tolist(), strict=True)) if total else dict(cohort.weights)
    return Aggregate(
        state, weights=weights, modules=modules, diagnosis={"radii": radii, "step_length": total}, n_iter=options.steps
    )


METHOD = Method(
    name="centred_clipping",
    title="Centred clipping of the changes",
    paper="Karimireddy et al. 2021 (arXiv 2012.10333), on products",
    averages="product",
    rule=centred_clipping,
    options=CentredClippingOptions,
    robust=True,
    weighted=False,
)
