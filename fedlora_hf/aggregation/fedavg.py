"""fedavg: weighted mean of A and of B, separately (inexact: the mean of B A is another matrix)."""
# SPDX-License-Identifier: Apache-2.0

import torch

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.shared import fitted
from fedlora_hf.methods.method import NoOptions
from fedlora_hf.update import AdapterState, Aggregate, LoraFactors


def mean_factors(cohort: Cohort, module: str) -> LoraFactors:
    """mean(A) and mean(B) of one module. Lower ranks are zero-padded (as HetLoRA does); scales are made equal first.

    Summed in float64, given back in float32 on the first client's device.
    """
    scale, clients = cohort.scale(module), cohort.factors(module)
    (out, width), rank = clients[0].shape, max(factors.rank for factors in clients)
    A = torch.zeros(rank, width, dtype=torch.float64, device=clients[0].A.device)
    B = torch.zeros(out, rank, dtype=torch.float64, device=A.device)
    for client_id, factors in zip(cohort.ids, clients, strict=True):
        weight = cohort.weights[client_id]
        A[: factors.rank] += weight * factors.A.to(A)
        B[:, : factors.rank] += weight * (factors.scale / scale) * factors.B.to(B)
    return LoraFactors(A.float(), B.float(), scale)


def fedavg(cohort: Cohort, options: NoOptions) -> Aggregate:
    """A = sum_k p_k A_k and B = sum_k p_k B_k, p_k the clients' weights; cut to the target rank where that is lower."""
    state, modules = {}, {}
    for module in cohort.modules:
        state[module], modules[module] = fitted(mean_factors(cohort, module), cohort.target_rank)
    return Aggregate(AdapterState(state, cohort.mean_extras()), weights=dict(cohort.weights), modules=modules)
