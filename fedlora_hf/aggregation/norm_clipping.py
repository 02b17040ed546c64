"""norm_clipping: the mean of the clients' changes, none of them longer than a bound."""
# SPDX-License-Identifier: Apache-2.0

from fedlora_hf.aggregation import changes
from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.methods.robust import NormClippingOptions
from fedlora_hf.numerics import clipping
from fedlora_hf.update import Aggregate


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
