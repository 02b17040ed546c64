"""norm_clipping: the mean of the clients' changes, none of them longer than a bound."""
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass

from fedlora_hf.aggregation import changes
from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.method import Method
from fedlora_hf.errors import ConfigError
from fedlora_hf.numerics import clipping
from fedlora_hf.update import Aggregate


@dataclass(frozen=True)
class NormClippingOptions:
    """max_norm: longest change of a client in a round, the Frobenius norm over all modules; default the median of the
    round's norms [our choice; the paper fixes a number]."""

    max_norm: float | None = None

    def __post_init__(self) -> None:
        if self.max_norm is not None and not 0 < self.max_norm < float("inf"):
            raise ConfigError(f"max_norm={self.max_norm}: must be above 0; leave it out for the median of the norms")


def norm_clipping(cohort: Cohort, options: NormClippingOptions) -> Aggregate:
    """W_0 + sum_k p_k D_k min(1, max_norm / ||D_k||), with D_k the change of the whole update from the round's start.

    Bounds what one client can do by its size, not by its direction: a sign flip of usual size passes.
    `diagnosis` has every client's norm and the bound.
    """
    lengths = clipping.norms(changes.gram(cohort))
    bound = clipping.lower_median(lengths) if options.max_norm is None else float(options.max_norm)
    factors = clipping.clip_factors(lengths, bound).tolist()
    coefficients = {k: cohort.weights[k] * c for k, c in zip(cohort.ids, factors, strict=True)}
    state, modules = changes.moved(cohort, coefficients)
    diagnosis = {"max_norm": bound, "norms": dict(zip(cohort.ids, lengths.tolist(), strict=True))}
    return Aggregate(state, weights=dict(cohort.weights), modules=modules, diagnosis=diagnosis)


METHOD = Method(
    name="norm_clipping",
    title="Mean of the changes, each clipped to a norm",
    paper="Sun et al. 2019 (arXiv 1911.07963), on products",
    averages="product",
    rule=norm_clipping,
    options=NormClippingOptions,
    robust=True,
    weighted=False,
)
