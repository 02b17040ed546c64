"""fedavg: weighted mean of A and of B, separately (inexact: the mean of B A is another matrix)."""
# SPDX-License-Identifier: Apache-2.0

import torch

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.method import Method, NoOptions
from fedlora_hf.update import AdapterState, Aggregate, LoraFactors


def mean_factors(cohort: Cohort, module: str) -> LoraFactors:
    """mean(A) and mean(B) of one module. Lower ranks are zero-padded (as HetLoRA does); scales are made equal first."""
    scale = cohort.scale(module)
    clients = [factors.to(torch.float32).rescaled(scale) for factors in cohort.factors(module)]
    rank = max(factors.rank for factors in clients)
    A = torch.zeros(rank, clients[0].shape[1])
    B = torch.zeros(clients[0].shape[0], rank)
    for client_id, factors in zip(cohort.ids, clients, strict=True):
        A[: factors.rank] += cohort.weights[client_id] * factors.A
        B[:, : factors.rank] += cohort.weights[client_id] * factors.B
    return LoraFactors(A, B, scale)


def fedavg(cohort: Cohort, options: NoOptions) -> Aggregate:
    """A = sum_k p_k A_k and B = sum_k p_k B_k, p_k the clients' weights."""
    state = {module: mean_factors(cohort, module) for module in cohort.modules}
    return Aggregate(AdapterState(state, cohort.mean_extras()), weights=dict(cohort.weights))


METHOD = Method(
    name="fedavg",
    title="Federated averaging of the LoRA factors",
    paper="McMahan et al. 2017 (arXiv 1602.05629); on LoRA: FedIT, Zhang et al. 2023 (arXiv 2305.05644)",
    averages="factors",
    rule=fedavg,
)
