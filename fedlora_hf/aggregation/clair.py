"""clair: clients far from what the majority shares left out, the others refined: shared part kept, rest averaged."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.methods.clair import ClairOptions
from fedlora_hf.numerics import clair as numerics
from fedlora_hf.numerics import lowrank
from fedlora_hf.numerics.clair.blocks import stack
from fedlora_hf.numerics.clair.evidence import Judgement
from fedlora_hf.numerics.evidence import Evidence, Kind
from fedlora_hf.update import AdapterState, Aggregate, ClientUpdate, LoraFactors

Pair = tuple[Tensor, Tensor]
Kinds = Mapping[str, Evidence]
# Share of its threshold below which the combined evidence on a flagged client must fall before it is taken back in.
CLEARED = 0.5


@dataclass(frozen=True, eq=False)
class CohortSource:
    """A cohort as `numerics.clair` reads it: one module at a time, one client's file after another."""

    cohort: Cohort

    @property
    def modules(self) -> Sequence[str]:
        return self.cohort.modules

    @property
    def restarted(self) -> bool:
        """Whether the clients started from nothing, so that what they hold is what they learned."""
        return self.cohort.reference is None

    def whole(self, module: str) -> Pair:
        """What the clients hold, stacked."""
        return self._stacked(module, None)

    def change(self, module: str) -> Pair:
        """What they learned this round: W_k less the reference they started from, of rank r + r_ref."""
        reference = self.cohort.reference
        return self._stacked(module, None if reference is None else reference[module])

    def _stacked(self, module: str, less: LoraFactors | None) -> Pair:
        updates = self.cohort.updates
        rank = max(update.state[module].rank for update in updates) + (less.rank if less is not None else 0)
        factors = (update.state[module] for update in updates)
        pairs = ((f if less is None else f - less).pair() for f in factors)
        return stack(pairs, len(updates), rank)


def clair(cohort: Cohort, options: ClairOptions) -> Aggregate:
    """Global adapter: weighted mean over the collaborative clients, re-factored to the cohort's rank. Personalised: the
    refined adapters of these clients, computed when asked for; PEFT's modules_to_save tensors stay each client's
    own [our choice]. Evidence is taken on the change since `cohort.reference`, refinement acts on the whole adapter.

    Raises UpdateError for fewer than 3 usable clients.
    """
    source = CohortSource(cohort)
    shares = torch.tensor([cohort.weights[client] for client in cohort.ids], dtype=torch.float64)
    solution = numerics.solve(source, shares, cohort.target_rank, options, partial(_verdict, cohort))
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
                client: {kind: float(scores[k]) for kind, scores in solution.module_scores[module].items()}
                for k, client in enumerate(cohort.ids)
            },
        }
    flagged = [client for client, bad in zip(cohort.ids, solution.flagged.tolist(), strict=True) if bad]
    this_round, several = _this_round(cohort, solution.judgement), bool(cohort.past or cohort.functional)
    personalised = {u.client_id: u for u in cohort.updates if u.client_id not in flagged and options.refine != "none"}
    refiner = Refiner(solution, options, written)
    return Aggregate(
        AdapterState(state, cohort.mean_extras(weights)),
        personalised=numerics.LazyMapping(tuple(personalised), partial(refiner.adapter, personalised)),
        weights=weights,
        flagged=tuple(flagged),
        evidence=_combined(cohort, this_round) if several else this_round,
        this_round=this_round if several else {},
        modules=modules,
        diagnosis=solution.judgement.described(cohort.ids),
        n_iter=solution.n_iter,
        converged=solution.converged,
    )


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


def _this_round(cohort: Cohort, judgement: Judgement) -> dict[str, dict[str, Evidence]]:
    return {client: judgement.of(k) for k, client in enumerate(cohort.ids)}


def _combined(cohort: Cohort, this_round: Mapping[str, Mapping[str, Evidence]]) -> dict[str, dict[str, Evidence]]:
    """Evidence on the clients of this round, with what earlier rounds found of them."""
    everything = accumulated(_rounds(cohort, this_round))
    return {client: everything[client] for client in cohort.ids}


def _rounds(cohort: Cohort, this_round: Mapping[str, Mapping[str, Evidence]]) -> list[Mapping[str, Kinds]]:
    """What every round found, this one last, with its functional evidence where that was taken."""
    now = {
        client: {**kinds, Kind.FUNCTIONAL: cohort.functional[client]} if client in cohort.functional else kinds
        for client, kinds in this_round.items()
    }
    return [*(past.evidence for past in cohort.past), now]


def _verdict(cohort: Cohort, judgement: Judgement) -> Tensor:
    """(K,) bool: flagged on the evidence of all rounds so far. Whoever was flagged in its last round stays so until the
    combined evidence, of all rounds and of those that could have flagged an unrelated client, has fallen below CLEARED
    of its threshold: once left out, a contaminated client is measured against a federation it no longer shapes, and
    rounds that tell little should not let it back in [our choice]."""
    this_round = _this_round(cohort, judgement)
    if not (cohort.past or cohort.functional):
        return judgement.flagged
    suspects = {client for client in cohort.ids if _last_flagged(cohort, client)}
    combined = _combined(cohort, this_round)
    telling = accumulated([_telling(found) for found in _rounds(cohort, this_round)])
    return torch.tensor(
        [
            any(e.flagged for e in combined[client].values())
            or (client in suspects and any(map(_lingers, (*combined[client].values(), *telling[client].values()))))
            for client in cohort.ids
        ]
    )


def _last_flagged(cohort: Cohort, client: str) -> bool:
    """Whether the client was flagged in the last round it took part in."""
    rounds = [past for past in cohort.past if client in past.evidence]
    return bool(rounds) and client in rounds[-1].flagged


def _telling(found: Mapping[str, Mapping[str, Evidence]]) -> dict[str, dict[str, Evidence]]:
    """A round's evidence without the kinds that could flag opposition alone: there an unrelated client passes."""
    return {
        client: {
            kind: evidence
            for kind, evidence in kinds.items()
            if kind not in (Kind.SUBSPACE, Kind.DIRECTION) or evidence.threshold is None or evidence.threshold < 1
        }
        for client, kinds in found.items()
    }


def _lingers(evidence: Evidence) -> bool:
    return evidence.threshold is not None and evidence.score > CLEARED * evidence.threshold


def accumulated(
    rounds: Iterable[Mapping[str, Mapping[str, Evidence]]], decay: float = 1.0
) -> dict[str, dict[str, Evidence]]:
    """{client: {kind: Evidence}} from the evidence of several rounds, oldest first.

    Per client and kind the mean over rounds of score / threshold, each held to [-4, 4], against 1; kinds and rounds in
    which nothing could be said are left out. A pure function: keep the rounds' evidence and ask again after each.
    """
    return numerics.accumulate(list(rounds), decay)
