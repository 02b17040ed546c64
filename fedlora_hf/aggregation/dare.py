"""dare: the mean of products of which random entries were dropped and the others enlarged to make up for them."""
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass

import torch

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.method import Method
from fedlora_hf.aggregation.shared import described, weighted_products
from fedlora_hf.errors import ConfigError
from fedlora_hf.numerics import lowrank, merging
from fedlora_hf.update import AdapterState, Aggregate, LoraFactors
from fedlora_hf.util.seeding import derive_seed


@dataclass(frozen=True)
class DareOptions:
    """density: share of the entries of each product W_k that is kept (1: all, which is product_mean to the bit).
    seed: what the draws follow from, with the client's id and the module's name."""

    density: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ConfigError(f"density={self.density}: must be above 0 and at most 1; choose 0.5 for instance")


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


METHOD = Method(
    name="dare",
    title="DARE: random entries of the products dropped, the mean rescaled",
    paper="Yu et al. 2023 (arXiv 2311.03099), on products",
    averages="product",
    rule=dare,
    options=DareOptions,
    weighted=False,
)
