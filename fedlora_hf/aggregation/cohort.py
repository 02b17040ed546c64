"""What a method is given: the usable updates of one round, sorted by client id, read module by module."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors


@dataclass(frozen=True, eq=False)
class Cohort:
    """One round's sound updates.

    updates: sorted by client id. weights: {client id: share}, summing to 1 (by examples, or uniform).
    modules: sorted names, the same in every update. target_rank: rank of the global adapter; None: the largest rank
    among the clients. reference: the adapter the clients started the round from (None: they started from nothing, so
    their updates are what they learned).
    """

    updates: tuple[ClientUpdate, ...]
    weights: Mapping[str, float]
    modules: tuple[str, ...]
    target_rank: int | None = None
    reference: AdapterState | None = None

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(update.client_id for update in self.updates)

    def factors(self, module: str) -> list[LoraFactors]:
        """Every client's factors of one module, in order: the only part of the cohort that is in memory at once."""
        return [update.state[module] for update in self.updates]

    def rank(self, module: str) -> int:
        """The rank the global adapter has for this module."""
        if self.target_rank is not None:
            return self.target_rank
        return max(update.state[module].rank for update in self.updates)

    def scale(self, module: str) -> float:
        """The scale to write the result with: the reference's, else the clients' common one, else 1."""
        if self.reference is not None:
            return self.reference[module].scale
        scales = {update.state[module].scale for update in self.updates}
        return scales.pop() if len(scales) == 1 else 1.0

    def subset(self, ids: Sequence[str]) -> "Cohort":
        """The same cohort with only these clients, their weights scaled to sum to 1 again (uniform if all were 0)."""
        kept = tuple(update for update in self.updates if update.client_id in set(ids))
        total = sum(self.weights[update.client_id] for update in kept)
        shares = {u.client_id: self.weights[u.client_id] / total if total else 1 / len(kept) for u in kept}
        return Cohort(kept, shares, self.modules, self.target_rank, self.reference)

    def mean_extras(self, weights: Mapping[str, float] | None = None) -> dict[str, Tensor]:
        """Weighted mean of the tensors trained whole (a classification head), in float32, in client order."""
        weights = self.weights if weights is None else weights
        means: dict[str, Tensor] = {}
        for update in self.updates:
            if weights.get(update.client_id):
                for name in sorted(update.state.extras):
                    term = update.state.extras[name].float() * weights[update.client_id]
                    means[name] = means[name] + term if name in means else term
        return means
