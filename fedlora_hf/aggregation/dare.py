"""dare: the mean of products of which random entries were dropped and the others enlarged to make up for them."""
# SPDX-License-Identifier: Apache-2.0

import torch

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.shared import described, weighted_products
from fedlora_hf.methods.merging import DareOptions
from fedlora_hf.numerics import lowrank, merging
from fedlora_hf.update import AdapterState, Aggregate, LoraFactors
from fedlora_hf.util.seeding import derive_seed


def dare(cohort: Cohort, options: DareOptions) -> Aggregate:
    """sum_k p_k (mask_k * W_k) / density, cut to the target rank; in expectation, before the cut, product_mean.

    What is dropped makes noise of full rank, most of which the cut takes away again: `discarded_energy` says how much.
    modules_to_save tensors are averaged, nothing of them is dropped.
    """
    if options.density == 1:
        state, modules = weighted_products(cohort, cohort.weights)
        return Aggregate(state, weights=dict(cohort.weights), modules=modules)
    factors, modules = {}, {}
    for module in cohort.modules:
        rank, scale = cohort.rank(module), cohort.scale(module)
        clients = cohort.factors(module)
        total = torch.zeros(clients[0].shape, dtype=torch.float64, device=clients[0].A.device)
        for client, update in zip(cohort.ids, clients, strict=True):
            seed = derive_seed(options.seed, "dare", client, module)
            total += cohort.weights[client] * merging.dropped(update.dense(torch.float64), options.density, seed)
        low = lowrank.truncate_dense(total, rank)
        factors[module], modules[module] = LoraFactors.from_low_rank(low, rank, scale), described(low, rank)
    return Aggregate(AdapterState(factors, cohort.mean_extras()), weights=dict(cohort.weights), modules=modules)
