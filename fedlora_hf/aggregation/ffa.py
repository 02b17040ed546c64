"""ffa: A is frozen and common to all, only B is trained and meaned, so the mean of the factors is exact."""
# SPDX-License-Identifier: Apache-2.0

from torch import Tensor

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.fedavg import mean_factors
from fedlora_hf.aggregation.method import Method, NoOptions
from fedlora_hf.aggregation.shared import fitted
from fedlora_hf.errors import UpdateError
from fedlora_hf.update import AdapterState, Aggregate, LoraFactors


def ffa(cohort: Cohort, options: NoOptions) -> Aggregate:
    """A = the common A, to the last bit; B = sum_k p_k B_k. UpdateError when a client's A is not the common one."""
    state, modules = {}, {}
    for module in cohort.modules:
        A = frozen_factor(cohort, module)
        mean = mean_factors(cohort, module)
        state[module], modules[module] = fitted(LoraFactors(A.float(), mean.B, mean.scale), cohort.target_rank)
    return Aggregate(AdapterState(state, cohort.mean_extras()), weights=dict(cohort.weights), modules=modules)


def frozen_factor(cohort: Cohort, module: str) -> Tensor:
    """The A that every client has: the reference's where there is one, else the first client's."""
    clients = cohort.factors(module)
    common = clients[0].A if cohort.reference is None else cohort.reference[module].A.to(clients[0].A.device)
    for client_id, factors in zip(cohort.ids, clients, strict=True):
        if not same(common, factors.A):
            raise UpdateError(
                f"{client_id}: A of {module} is not the common one: ffa needs one frozen A; "
                "train B alone from shared factors, or choose method product_mean"
            )
    return common


def same(A: Tensor, other: Tensor) -> bool:
    """Equal, entry by entry, in the narrower of the two dtypes: one client may send bfloat16, another float32."""
    narrow = min(A.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return A.shape == other.shape and bool((A.to(narrow) == other.to(A.device, narrow)).all())


METHOD = Method(
    name="ffa",
    title="Frozen A, averaged B",
    paper="FFA-LoRA, Sun et al. 2024 (arXiv 2403.12313)",
    averages="product",
    rule=ffa,
    trains=("B",),
)
