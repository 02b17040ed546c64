"""ties: small entries trimmed, a sign elected for each entry, the mean of the clients that have it."""
# SPDX-License-Identifier: Apache-2.0

from dataclasses import replace
from functools import partial

import torch

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.shared import coordinatewise
from fedlora_hf.methods.merging import TiesOptions
from fedlora_hf.numerics import merging
from fedlora_hf.update import AdapterState, Aggregate


def ties(cohort: Cohort, options: TiesOptions) -> Aggregate:
    """TIES of the products, cut to the target rank; ranks and scales may differ.

    A trimmed low-rank matrix is not low-rank, nor is a merged one: `discarded_energy` says what the cut loses.
    modules_to_save tensors are averaged.
    """
    shares = torch.tensor([cohort.weights[client] for client in cohort.ids], dtype=torch.float64)
    state, modules = {}, {}
    for module in cohort.modules:
        one = tuple(replace(update, state=update.state.restricted((module,))) for update in cohort.updates)
        factors = cohort.factors(module)
        limits = [merging.trim_threshold(f.dense(torch.float64), options.density) for f in factors]
        device = factors[0].A.device
        statistic = partial(
            merging.ties,
            weights=shares.to(device),
            thresholds=torch.tensor(limits, dtype=torch.float64, device=device),
        )
        merged, info = coordinatewise(replace(cohort, updates=one, modules=(module,)), statistic)
        state[module], modules[module] = merged[module], info[module]
    return Aggregate(AdapterState(state, cohort.mean_extras()), weights=dict(cohort.weights), modules=modules)
