"""clair: clients far from what the majority shares left out, the others refined: shared part kept, rest averaged."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.counts import limited
from fedlora_hf.aggregation.over_rounds import combined, found_in, suspicion, trusted_now, verdict
from fedlora_hf.methods.clair import ClairOptions
from fedlora_hf.numerics import clair as numerics
from fedlora_hf.numerics import lowrank
from fedlora_hf.numerics.clair.blocks import dtype_of, stack
from fedlora_hf.numerics.clair.source import Key
from fedlora_hf.update import AdapterState, Aggregate, ClientUpdate, LoraFactors

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class CohortSource:
    """A cohort as `numerics.clair` reads it: one module at a time, one client's file after another; several modules at
    once where they are stacked on a GPU."""

    cohort: Cohort

    @property
    def modules(self) -> Sequence[str]:
        return self.cohort.modules

    @property
    def keys(self) -> Sequence[Key]:
        return self.cohort.modules if self.cohort.several is None else self.cohort.several.groups

    @property
    def restarted(self) -> bool:
        """Whether the clients started from nothing, so that what they hold is what they learned."""
        return self.cohort.reference is None

    @property
    def large(self) -> bool:
        return self.cohort.large

    def whole(self, key: Key) -> Pair:
        """What the clients hold, stacked."""
        return self._stacked(key, None) if isinstance(key, str) else self._several(key)

    def with_start(self, key: Key) -> Pair:
        """The same, and the reference as one row more."""
        reference = self.cohort.reference
        if isinstance(key, str):
            return self._stacked(key, None, also=() if reference is None else (reference,))
        B, A = self._several(key)
        own = self._references(key, B)
        if own is None:
            return B, A
        return _joined(B, own[0], -1), _joined(A, own[1], -2)

    def change(self, key: Key) -> Pair:
        """What they learned this round: W_k less the reference they started from, of rank r + r_ref."""
        reference = self.cohort.reference
        if isinstance(key, str):
            return self._stacked(key, None if reference is None else reference[key])
        B, A = self._several(key)
        own = self._references(key, B)
        if own is None:
            return B, A
        minus, less = (part.expand(-1, B.shape[1], -1, -1) for part in own)
        return torch.cat([B, -minus], dim=-1), torch.cat([A, less], dim=-2)

    def _several(self, key: tuple[str, ...]) -> Pair:
        """Of modules that are stacked on a GPU, in the dtype that `stack` has for their size."""
        if self.cohort.several is None:
            raise LookupError(f"{key[0]}: this cohort is read module by module")
        stack, reference = self.cohort.several.stacked(key), self.cohort.reference
        more = 0 if reference is None else max(reference[module].rank for module in key)
        numbers = stack.A.shape[1] * (stack.A.shape[2] + more) * (stack.B.shape[2] + stack.A.shape[3])
        return stack.pair(dtype_of(numbers))

    def _references(self, key: tuple[str, ...], like: Tensor) -> Pair | None:
        """The reference's factors as one client more: B (M, 1, out, r) and A (M, 1, r, in), where and as `like` is."""
        reference = self.cohort.reference
        if reference is None:
            return None
        rank = max(reference[module].rank for module in key)
        B, A = zip(*(reference[module].padded(rank).pair() for module in key), strict=True)
        return torch.stack(B).to(like)[:, None], torch.stack(A).to(like)[:, None]

    def _stacked(self, module: str, less: LoraFactors | None, also: Sequence[AdapterState] = ()) -> Pair:
        states = [*(update.state for update in self.cohort.updates), *also]
        rank = max(state.rank(module) for state in states) + (less.rank if less is not None else 0)
        device = self.cohort.device
        less = less if less is None or device is None else less.to(device)
        factors = (state[module] if device is None else state[module].to(device) for state in states)
        pairs = ((f if less is None else f - less).pair() for f in factors)
        return stack(pairs, len(states), rank)


def _joined(clients: Tensor, one: Tensor, side: int) -> Tensor:
    """One client more in dimension 1; the rank, in dimension `side`, is the larger of the two, with zeros."""
    rank, before = max(clients.shape[side], one.shape[side]), [0] * (-2 * side - 1)  # `pad` counts from the last
    return torch.cat([pad(part, [*before, rank - part.shape[side]]) for part in (clients, one)], dim=1)


def clair(cohort: Cohort, options: ClairOptions) -> Aggregate:
    """Global adapter: weighted mean over the collaborative clients, re-factored to the cohort's rank. Personalised: the
    refined adapters of these clients, computed when asked for; PEFT's modules_to_save tensors stay each client's
    own [our choice]. Evidence is taken on the change since `cohort.reference`, refinement acts on the whole adapter.

    Raises UpdateError for fewer than 3 usable clients.
    """
    source = CohortSource(cohort)
    shares = torch.tensor([cohort.weights[client] for client in cohort.ids], dtype=torch.float64)
    # A false count is capped before influence is taken; where that falls on the others, it would still own the mean.
    solution = numerics.solve(
        source,
        shares,
        cohort.target_rank,
        options,
        verdict=partial(verdict, cohort),
        trusted=trusted_now(cohort, options.influence),
        held=partial(held, cohort),
    )
    weights = dict(zip(cohort.ids, solution.shares.tolist(), strict=True))
    state, modules, written = {}, {}, {}
    for module, fit in solution.fits.items():
        rank, scale = written[module] = cohort.rank(module), cohort.scale(module)
        low = numerics.turned_back(fit.total, options.side)
        state[module] = LoraFactors.from_low_rank(low, rank, scale)
        modules[module] = {
            "rank": rank,
            "subspace_rank": fit.rank,
            "spectrum": fit.spectrum.tolist(),
            "discarded_energy": fit.total.discarded,
            "evidence": {
                client: dict(zip(solution.module_scores[module], scores, strict=True))
                for client, *scores in zip(cohort.ids, *_lists(solution.module_scores[module]), strict=True)
            },
        }
    flagged = [client for client, bad in zip(cohort.ids, solution.flagged.tolist(), strict=True) if bad]
    this_round, several = found_in(cohort, solution.judgement), bool(cohort.past or cohort.functional)
    evidence = combined(cohort, this_round) if several else this_round
    personalised = {u.client_id: u for u in cohort.updates if u.client_id not in flagged and options.refine != "none"}
    refiner = Refiner(solution, options, written)
    return Aggregate(
        AdapterState(state, cohort.mean_extras(weights)),
        personalised=numerics.LazyMapping(tuple(personalised), partial(refiner.adapter, personalised)),
        weights=weights,
        influence=dict(zip(cohort.ids, solution.kept.tolist(), strict=True)),
        flagged=tuple(flagged),
        suspicious=suspicion(flagged, this_round, evidence),
        evidence=evidence,
        this_round=this_round if several else {},
        modules=modules,
        diagnosis=solution.judgement.described(cohort.ids),
        n_iter=solution.n_iter,
        converged=solution.converged,
    )


def _lists(scores: Mapping[str, Tensor]) -> list[list[float]]:
    return [values.tolist() for values in scores.values()]


def held(cohort: Cohort, shares: Tensor) -> Tensor:
    """(K,) weights in the mean, those of clients whose claim of examples was not believed held to their limits."""
    weights = limited(dict(zip(cohort.ids, shares.tolist(), strict=True)), cohort.weight_limits)
    return torch.tensor([weights[client] for client in cohort.ids], dtype=shares.dtype)


@dataclass(frozen=True, eq=False)
class Refiner:
    """What makes refined adapters: the solution, and each module's (rank, scale), read once from the cohort."""

    solution: numerics.Solution
    options: ClairOptions
    written: Mapping[str, tuple[int, float]]

    def adapter(self, updates: Mapping[str, ClientUpdate], client: str) -> AdapterState:
        """One client's refined adapter, itself computed module by module when read."""
        state = updates[client].state
        return AdapterState(numerics.LazyMapping(tuple(state), partial(self.module, state)), state.extras)

    def module(self, state: AdapterState, module: str) -> LoraFactors:
        """The refined factors of one module, at the module's rank or, when `exact`, at their own."""
        low = self.low_rank(state, module)
        rank, scale = self.written[module]
        return LoraFactors.from_low_rank(low, low.A.shape[0] if self.options.exact else rank, scale)

    def low_rank(self, state: AdapterState, module: str) -> lowrank.LowRank:
        """The refined update of one module with the energy that re-factoring it discards."""
        pair = state[module].pair(torch.float64)
        return numerics.refined(self.solution.fits[module], pair, self.options, self.written[module][0])
