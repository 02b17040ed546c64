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
    return mean_of_other(cohort, "A", "ffa")


def mean_of_other(cohort: Cohort, common: str, method: str) -> Aggregate:
    """`common` ("A" or "B") as it is and the mean of the other factor, over the clients that have the common one."""
    unlike = other_factors(cohort, common)
    if len(unlike) == len(cohort.ids):
        last = cohort.ids[-1]
        other = "B" if common == "A" else "A"
        raise UpdateError(
            f"{last}: {common} of {unlike[last]} is not the common one: {method} needs one frozen {common}; "
            f"train {other} alone from shared factors, or choose method product_mean"
        )
    kept = cohort.subset([client for client in cohort.ids if client not in unlike]) if unlike else cohort
    state, modules = {}, {}
    for module in cohort.modules:
        first = (cohort.reference or kept.updates[0].state)[module]
        found = _joined(first, mean_factors(kept, module), common)
        state[module], modules[module] = fitted(found, cohort.target_rank)
    reasons = {
        client: f"{common} of {module} is not the common one: {method} needs one frozen {common}"
        for client, module in unlike.items()
    }
    means = AdapterState(state, kept.mean_extras())
    return Aggregate(means, weights=dict(kept.weights), modules=modules, quarantined=reasons)


def _joined(first: LoraFactors, mean: LoraFactors, common: str) -> LoraFactors:
    """The common factor beside the mean of the other. A mean B has the result's scale; a common B has its own."""
    if common == "A":
        return LoraFactors(first.A.float(), mean.B, mean.scale)
    return LoraFactors(mean.A, first.B.float(), first.scale)


def other_factors(cohort: Cohort, factor: str = "A") -> dict[str, str]:
    """{client: module} of those whose factor is not the common one: the reference's where there is one, else that of
    the largest group of clients with one (a tie goes to the group of the first client in the alphabet). All of the
    clients, where nobody has the reference's or no two have the same."""
    leaders: list[Mapping[str, LoraFactors]] = [] if cohort.reference is None else [cohort.reference]
    groups: list[list[str]] = [[] for _ in leaders]
    strange: dict[str, str] = {}
    for update in cohort.updates:
        differing = [first_difference(leader, update.state, cohort.modules, factor) for leader in leaders]
        if None in differing:
            groups[differing.index(None)].append(update.client_id)
        elif cohort.reference is None:
            leaders.append(update.state)
            groups.append([update.client_id])
        strange[update.client_id] = next(filter(None, differing), cohort.modules[0])
    largest = max(groups, key=len)
    if len(largest) == 1 < len(cohort.ids):
        largest = []
    return {client: module for client, module in strange.items() if client not in largest}


def first_difference(
    common: Mapping[str, LoraFactors], state: Mapping[str, LoraFactors], modules: Iterable[str], factor: str = "A"
) -> str | None:
    """The first module whose factor is not the common one, or None. A common B has one scale too: s B counts."""
    for module in modules:
        one, other = common[module], state[module]
        alike = same(one.A, other.A) if factor == "A" else one.scale == other.scale and same(one.B, other.B)
        if not alike:
            return module
    return None


def same(A: Tensor, other: Tensor) -> bool:
    """Equal, entry by entry, in the narrower of the two dtypes: one client may send bfloat16, another float32."""
    narrow = min(A.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return A.shape == other.shape and bool((A.to(narrow) == other.to(A.device, narrow)).all())
