"""A round's changes D_k = W_k - W_0 from the adapter that the clients started from; without one, W_0 = 0."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.shared import ModuleInfo, described
from fedlora_hf.numerics import lowrank
from fedlora_hf.update import AdapterState, LoraFactors


def gram(cohort: Cohort, more: tuple[Mapping[str, LoraFactors], ...] = ()) -> Tensor:
    """(K + n, K + n) float64: <D_j, D_k> over all modules, from the factors (PEFT's modules_to_save left out).

    more: n further adapters, with the cohort's modules, that take part as clients do.
    """
    size = len(cohort.updates) + len(more)
    total = torch.zeros(size, size, dtype=torch.float64)
    for module in cohort.modules:
        pairs = [f.pair(torch.float64) for f in (*cohort.factors(module), *(state[module] for state in more))]
        if cohort.reference is not None:
            pairs.append(cohort.reference[module].to(pairs[0][0].device).pair(torch.float64))
        total += _from_start(lowrank.inner_products(pairs).cpu(), cohort.reference is not None)
    return total


def _from_start(products: Tensor, started: bool) -> Tensor:
    """The Gram of w_k - w_0 from that of all w, the last one being w_0."""
    if not started:
        return products
    start = products[:-1, -1]
    return products[:-1, :-1] - start[:, None] - start + products[-1, -1]


def moved(cohort: Cohort, coefficients: Mapping[str, float]) -> tuple[AdapterState, ModuleInfo]:
    """W_0 + sum_k coefficients[k] D_k, exactly, re-factored to the cohort's rank.

    Coefficients that sum to 1 leave nothing of W_0. modules_to_save tensors move alike from the start's; where there is
    no start they are averaged with the coefficients' shares, because a head does not begin at zero [our choice].
    """
    state, info = {}, {}
    total = sum(coefficients.values())
    stays = 1 - total if abs(1 - total) > 1e-12 and cohort.reference is not None else 0.0
    for module in cohort.modules:
        rank, scale = cohort.rank(module), cohort.scale(module)
        kept = [(f, coefficients[k]) for k, f in zip(cohort.ids, cohort.factors(module), strict=True)]
        if stays and cohort.reference is not None:
            kept.append((cohort.reference[module].to(kept[0][0].A.device), stays))
        kept = [(f, c) for f, c in kept if c] or kept
        low = lowrank.mean_truncated([(f.B, f.A) for f, _ in kept], [c * f.scale for f, c in kept], rank)
        state[module], info[module] = LoraFactors.from_low_rank(low, rank, scale), described(low, rank)
    return AdapterState(state, _moved_extras(cohort, coefficients, total, stays)), info


def _moved_extras(cohort: Cohort, coefficients: Mapping[str, float], total: float, stays: float) -> dict[str, Tensor]:
    if cohort.reference is None:
        equal = dict.fromkeys(coefficients, 1 / len(coefficients))
        return cohort.mean_extras({k: c / total for k, c in coefficients.items()} if total > 0 else equal)
    means = cohort.mean_extras(coefficients)
    start = cohort.reference.extras
    if not any(coefficients.values()):
        return {name: start[name].float() for name in cohort.extras}
    return {name: (m.double() + stays * start[name].to(m.device).double()).float() for name, m in means.items()}
