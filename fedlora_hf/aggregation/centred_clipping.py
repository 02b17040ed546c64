"""centred_clipping: a mean found in a few steps, each of them clipping what lies far from where it stands."""
# SPDX-License-Identifier: Apache-2.0

import torch

from fedlora_hf.aggregation import changes
from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.counts import limited
from fedlora_hf.methods.robust import CentredClippingOptions
from fedlora_hf.numerics import clipping
from fedlora_hf.update import Aggregate


def centred_clipping(cohort: Cohort, options: CentredClippingOptions) -> Aggregate:
    """V <- V + sum_k p_k (D_k - V) min(1, tau / ||D_k - V||), from V = 0, which is the round's start.

    Everything follows from inner products of the factors. The paper starts from the last round's momentum, clips
    clients' momenta and weighs clients alike: here the changes D_k, and `weight_by="uniform"` weighs them alike.
    """
    shares = torch.tensor([cohort.weights[client] for client in cohort.ids], dtype=torch.float64)
    found, radii = clipping.centred(changes.gram(cohort), shares, options.radius, options.steps)
    total = float(found.sum())
    shared = dict(zip(cohort.ids, (found / total).tolist(), strict=True)) if total else dict(cohort.weights)
    weights = limited(shared, cohort.weight_limits)
    state, modules = changes.moved(cohort, {client: weight * total for client, weight in weights.items()})
    return Aggregate(
        state, weights=weights, modules=modules, diagnosis={"radii": radii, "step_length": total}, n_iter=options.steps
    )
