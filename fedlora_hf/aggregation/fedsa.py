"""fedsa: clients share A alone and keep their own B; each client's adapter is (mean A, own B)."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.fedavg import fedavg, mean_factors
from fedlora_hf.methods.method import NoOptions
from fedlora_hf.update import AdapterState, Aggregate, ClientUpdate, LoraFactors


class OwnB(Mapping[str, LoraFactors]):
    """{module: (mean A, one client's B)}; B is read when asked for, so a client on disk stays there.

    A client of lower rank takes the first rows of the mean A, those it has a part in.
    """

    def __init__(self, means: Mapping[str, Tensor], update: ClientUpdate) -> None:
        self.means, self.update = means, update

    def __getitem__(self, module: str) -> LoraFactors:
        A, own = self.means[module], self.update.state[module]
        return LoraFactors(A[: own.rank].to(own.B.device), own.B.float(), own.scale)

    def __iter__(self) -> Iterator[str]:
        return iter(self.means)

    def __len__(self) -> int:
        return len(self.means)


def fedsa(cohort: Cohort, options: NoOptions) -> Aggregate:
    """Personalised (mean A, own B), modules_to_save tensors kept by the client too, as in the authors' experiments.

    FedSA-LoRA defines no global adapter; the one given is (mean A, mean B), the same as fedavg's [our choice].
    """
    means = {module: mean_factors(cohort, module).A for module in cohort.modules}
    personalised = {
        update.client_id: AdapterState(OwnB(means, update), update.state.extras) for update in cohort.updates
    }
    return replace(fedavg(cohort, options), personalised=personalised)
