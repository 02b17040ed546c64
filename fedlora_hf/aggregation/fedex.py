"""fedex: the mean of A and of B, and beside it what these miss of the mean of the products."""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import torch

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.fedavg import mean_factors
from fedlora_hf.aggregation.shared import fitted
from fedlora_hf.methods.method import NoOptions
from fedlora_hf.numerics import lowrank
from fedlora_hf.update import AdapterState, Aggregate, LoraFactors

# Singular values of the residual below this share of the mean's largest are rounding of float32 factors.
ROUNDING = 1e-6


def residual(cohort: Cohort, module: str, mean: LoraFactors) -> LoraFactors:
    """sum_k p_k W_k - s mean(B) mean(A), exact to rounding, of its numerical rank (0: nothing is missed)."""
    clients = cohort.factors(module)
    pairs = [*((f.B, f.A) for f in clients), (mean.B, mean.A)]
    weights = [cohort.weights[k] * f.scale for k, f in zip(cohort.ids, clients, strict=True)]
    most = min(*mean.shape, sum(A.shape[0] for _, A in pairs))
    low = lowrank.mean_truncated(pairs, [*weights, -mean.scale], most)
    size = max(mean.norm(), float(torch.linalg.vector_norm(low.spectrum)))
    rank = int((low.spectrum[:most] > ROUNDING * size).sum())
    return LoraFactors.from_low_rank(
        lowrank.LowRank(low.B[:, :rank], low.A[:rank], low.spectrum, 0.0), rank, mean.scale
    )


def joined(mean: LoraFactors, rest: LoraFactors) -> LoraFactors:
    """The sum as one adapter: the mean's rows come first, so that `mean.rank` rows of it are the mean again."""
    rest = rest.rescaled(mean.scale)
    return LoraFactors(torch.cat([mean.A, rest.A]), torch.cat([mean.B, rest.B], dim=1), mean.scale)


def fedex(cohort: Cohort, options: NoOptions) -> Aggregate:
    """[mean(A); A_res] and [mean(B), B_res]: the exact mean of the products, of a rank that grows by the residual's.

    FedEx-LoRA adds the residual to the frozen base; here it stays in the adapter, which stock PEFT loads and merges.
    Where a target rank is asked for, the sum is cut to it, and `discarded_energy` says what that adapter cannot hold.
    `residual_energy`: the residual's share of the exact mean's squared norm, which is what fedavg gets wrong.
    """
    state, modules = {}, {}
    for module in cohort.modules:
        mean = mean_factors(cohort, module)
        rest = residual(cohort, module, mean)
        whole = joined(mean, rest) if rest.rank else mean
        size = whole.norm()
        info: dict[str, Any] = {"residual_rank": rest.rank}
        info["residual_energy"] = (rest.norm() / size) ** 2 if size else 0.0
        state[module], described = fitted(whole, cohort.target_rank)
        modules[module] = described | info
    return Aggregate(AdapterState(state, cohort.mean_extras()), weights=dict(cohort.weights), modules=modules)
