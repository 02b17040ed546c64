"""What a method is given: the usable updates of one round, sorted by client id, read module by module."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from fedlora_hf.aggregation.stacks import Stacks
from fedlora_hf.numerics.evidence import Evidence
from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors
from fedlora_hf.util.side_by_side import LARGE


@dataclass(frozen=True)
class PastRound:
    """What an earlier round found: {client id: {kind: Evidence}} of that round alone, and whom it ended up flagging."""

    evidence: Mapping[str, Mapping[str, Evidence]]
    flagged: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Cohort:
    """One round's sound updates.

    updates: sorted by client id. weight_by: "examples" or "uniform", see `client_weights`.
    modules: sorted names, the same in every update. target_rank: rank of the global adapter;
    None: the largest rank among the clients. reference: the adapter the clients started the round from (None: they
    started from nothing, so their updates are what they learned).
    past: what earlier rounds found, oldest first, for methods that combine evidence over rounds.
    weight_limits: {client id: how many times the median weight it may have at most} of those whose claims of examples
        were not believed, for methods whose weights do not follow from the counts alone.
    functional: {client id: what its update does to others' losses}, of this round, where that was measured.
    server: an update trained on the server's own data from the same start, for methods that compare with it.
    device: where modules are worked on; None: where their factors are. stacks: of them there, several at once; None:
        module by module.
    """

    updates: tuple[ClientUpdate, ...]
    weight_by: str
    modules: tuple[str, ...]
    target_rank: int | None = None
    reference: AdapterState | None = None
    past: tuple[PastRound, ...] = ()
    functional: Mapping[str, Evidence] = field(default_factory=dict)
    weight_limits: Mapping[str, float] = field(default_factory=dict)
    server: AdapterState | None = None
    device: torch.device | None = None
    stacks: Stacks | None = None

    @cached_property
    def weights(self) -> Mapping[str, float]:
        """{client id: share of the mean}, summing to 1."""
        return client_weights(self.updates, self.weight_by)

    @property
    def several(self) -> Stacks | None:
        """The stacks, where they are of these very updates."""
        return self.stacks if self.stacks is not None and self.stacks.updates is self.updates else None

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(update.client_id for update in self.updates)

    @property
    def extras(self) -> tuple[str, ...]:
        """Sorted names of PEFT's modules_to_save tensors (a classification head), the same in every update."""
        return tuple(sorted(self.updates[0].state.extras))

    def factors(self, module: str) -> list[LoraFactors]:
        """Every client's factors of one module, in order: the only part of the cohort that is in memory at once."""
        if self.several is not None:
            return self.several.factors(module)
        factors = [update.state[module] for update in self.updates]
        return factors if self.device is None else [f.to(self.device) for f in factors]

    @property
    def large(self) -> bool:
        """Whether the modules are worth a thread each: on a CPU, by the first one."""
        f = self.updates[0].state[self.modules[0]]
        on_cpu = (self.device or f.A.device).type == "cpu"
        return on_cpu and len(self.updates) * (f.A.numel() + f.B.numel()) > LARGE

    def rank(self, module: str) -> int:
        """The rank the global adapter has for this module."""
        if self.target_rank is not None:
            return self.target_rank
        return max(update.state.rank(module) for update in self.updates)

    def scale(self, module: str) -> float:
        """The scale to write the result with: the reference's, else the clients' common one, else 1."""
        if self.reference is not None:
            return self.reference[module].scale
        scales = {update.state.scale(module) for update in self.updates}
        return scales.pop() if len(scales) == 1 else 1.0

    def subset(self, ids: Iterable[str]) -> "Cohort":
        """The cohort of these clients alone, to the bit as if the others had never come."""
        kept = set(ids)
        return replace(self, updates=tuple(update for update in self.updates if update.client_id in kept))

    def mean_extras(self, weights: Mapping[str, float] | None = None) -> dict[str, Tensor]:
        """Weighted mean of the modules_to_save tensors, summed in float64 in client order, given back in float32."""
        weights = self.weights if weights is None else weights
        kept = [update for update in self.updates if weights.get(update.client_id)]
        means = {}
        for name in self.extras if kept else ():
            total = torch.zeros_like(kept[0].state.extras[name], dtype=torch.float64)
            for update in kept:
                total += update.state.extras[name].to(total) * weights[update.client_id]
            means[name] = total.float()
        return means


def client_weights(updates: Iterable[ClientUpdate], weight_by: str) -> dict[str, float]:
    """{client id: share of the mean}, summing to 1: by number of examples where every client tells it, or uniform."""
    updates = list(updates)
    counts = [update.num_examples for update in updates]
    if weight_by == "uniform" or None in counts:
        return {update.client_id: 1 / len(updates) for update in updates}
    total = sum(count for count in counts if count is not None)
    return {update.client_id: (update.num_examples or 0) / total for update in updates}
