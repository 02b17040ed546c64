"""ffa: A is frozen and common to all, only B is trained and averaged, so the mean of the factors is exact."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterable, Mapping

from torch import Tensor

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.fedavg import mean_factors
from fedlora_hf.aggregation.shared import fitted
from fedlora_hf.errors import UpdateError
from fedlora_hf.methods.method import NoOptions
from fedlora_hf.update import AdapterState, Aggregate, LoraFactors


def ffa(cohort: Cohort, options: NoOptions) -> Aggregate:
    """A = the common A, to the last bit; B = sum_k p_k B_k over the clients that have it; the others are quarantined.

    UpdateError when no client has the round's A or, in a cohort that started from nothing, no two have the same.
    """
    unlike = other_factors(cohort)
    kept = cohort.subset([client for client in cohort.ids if client not in unlike]) if unlike else cohort
    state, modules = {}, {}
    for module in cohort.modules:
        A = (cohort.reference or kept.updates[0].state)[module].A
        mean = mean_factors(kept, module)
        state[module], modules[module] = fitted(LoraFactors(A.float(), mean.B, mean.scale), cohort.target_rank)
    means = AdapterState(state, kept.mean_extras())
    return Aggregate(means, weights=dict(kept.weights), modules=modules, quarantined=unlike)


def other_factors(cohort: Cohort) -> dict[str, str]:
    """{client: reason} of those whose A is not the common one: the reference's where there is one, else that of the
    largest group of clients with one A (a tie goes to the group of the first client in the alphabet)."""
    leaders: list[Mapping[str, LoraFactors]] = [] if cohort.reference is None else [cohort.reference]
    groups: list[list[str]] = [[] for _ in leaders]
    strange: dict[str, str] = {}
    for update in cohort.updates:
        differing = [first_difference(leader, update.state, cohort.modules) for leader in leaders]
        if None in differing:
            groups[differing.index(None)].append(update.client_id)
        elif cohort.reference is None:
            leaders.append(update.state)
            groups.append([update.client_id])
        strange[update.client_id] = next(filter(None, differing), cohort.modules[0])
    largest = max(groups, key=len)
    if not largest or (len(largest) == 1 < len(cohort.ids)):
        raise UpdateError(
            f"{cohort.ids[-1]}: A of {strange[cohort.ids[-1]]} is not the common one: ffa needs one frozen A; "
            "train B alone from shared factors, or choose method product_mean"
        )
    return {
        client: f"A of {module} is not the common one: ffa needs one frozen A"
        for client, module in strange.items()
        if client not in largest
    }


def first_difference(
    common: Mapping[str, LoraFactors], state: Mapping[str, LoraFactors], modules: Iterable[str]
) -> str | None:
    """The first module whose A is not the common one, or None."""
    return next((module for module in modules if not same(common[module].A, state[module].A)), None)


def same(A: Tensor, other: Tensor) -> bool:
    """Equal, entry by entry, in the narrower of the two dtypes: one client may send bfloat16, another float32."""
    narrow = min(A.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return A.shape == other.shape and bool((A.to(narrow) == other.to(A.device, narrow)).all())
