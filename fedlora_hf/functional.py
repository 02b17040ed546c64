"""Functional evidence: what a client's change does to the validation loss of other clients.

Where honest clients share nothing, updates alone cannot tell different from contaminated; the loss of others may know a
little more, if an honest change costs them less than a spoiled one. It takes evaluations, so only a panel of clients
judges. Measured, it is weak in one round, and worthless where many judges lie: docs/results/validity_map.
"""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedlora_hf.numerics.clair.flagging import critical_z, shorth
from fedlora_hf.personalise import mix
from fedlora_hf.seeding import derive_seed
from fedlora_hf.update import AdapterState, ClientUpdate, Evidence

if TYPE_CHECKING:
    from fedlora_hf.scorer import Scorer

# Shares of a client's change that are tried: a small step tells agreement, the whole one tells damage [our choice].
SCALES = (0.3, 1.0)
# Differences below this share of a judge's loss count for nothing, nor do judges' medians closer than LEAST_HARM of
# their spreads.
LEAST_SPREAD, LEAST_HARM = 0.002, 0.25
# What counts as the change of a loss that is not finite any more, in nats.
BROKEN = 1e6

Effects = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Functional:
    """evidence: {client: Evidence}, in standard deviations. changes: {client: {scale: median over the judges of the
    change of their loss, nats; positive is harm}}. evaluations: how many splits were scored for it."""

    evidence: Mapping[str, Evidence]
    changes: Mapping[str, Mapping[float, float]]
    evaluations: int


def functional_evidence(
    scorer: "Scorer",
    start: AdapterState,
    updates: Iterable[ClientUpdate],
    validation: Mapping[str, Any],
    *,
    judges: int = 5,
    seed: int = 0,
    scales: Sequence[float] = SCALES,
) -> Functional:
    """How much worse each client's change makes others' validation loss, against what is usual in the cohort.

    start: the adapter the round started from; updates: whole adapters, read one at a time. `start + scale * change` is
        scored as an adapter of the model's rank: exact at scale 1, and wherever the start is still zero.
    validation: {client: its tokenised validation split}; clients without one, or with an empty one, judge nobody.
    judges: how many other clients judge each client. One panel of judges + 1, drawn from the seed, judges all, none of
        them itself: paired effects are compared, which told more than as many judges drawn for each client alone. Its
        median holds while fewer than half of the panel are contaminated; draw another panel every round.

    Costs one evaluation for each of the panel, and clients * judges * scales more. Clients whom nobody can judge, and
    all in a cohort of fewer than 3, get the threshold None.
    """
    updates = sorted(updates, key=lambda update: update.client_id)
    panel = drawn_panel(validation, judges + 1, seed)
    before = {judge: _loss(scorer, start, validation[judge]) for judge in panel}
    effects: dict[float, dict[str, dict[str, float]]] = {scale: {} for scale in scales}
    for update in updates:
        others = [judge for judge in panel if judge != update.client_id]
        if others:
            state = update.state.in_memory()
            for scale in scales:
                moved = state if scale == 1 else mix(start, state, scale, scorer.rank)
                after = {judge: _loss(scorer, moved, validation[judge]) for judge in others}
                effects[scale][update.client_id] = {judge: after[judge] - before[judge] for judge in others}
    judged = list(effects[scales[0]])
    changes = {client: {scale: median(effects[scale][client].values()) for scale in scales} for client in judged}
    evidence = {update.client_id: Evidence(0.0, None) for update in updates}
    if len(judged) >= 3:
        harm = {scale: relative_harm(effects[scale], before) for scale in scales}
        scores = harm_scores({client: mean(harm[scale][client] for scale in scales) for client in judged})
        for client, score in scores.items():
            harmless = max(changes[client].values()) <= 0
            evidence[client] = Evidence(min(score, 0.0) if harmless else score, critical_z(len(judged)))
    evaluations = len(before) + sum(len(found) for at in effects.values() for found in at.values())
    return Functional(evidence, changes, evaluations)


def drawn_panel(validation: Mapping[str, Any], count: int, seed: int) -> list[str]:
    """`count` of the clients that have validation examples, or all of them; sorted, a function of the seed."""
    able = sorted(client for client, split in validation.items() if split is not None and len(split))
    order = np.random.default_rng(derive_seed(seed, "judges")).permutation(len(able))
    return sorted(able[place] for place in order[:count])


def relative_harm(effects: Effects, losses: Mapping[str, float]) -> dict[str, float]:
    """{client: median over its judges of (effect - what is usual for the judge) / the judge's spread} [our choice].

    effects: {client: {judge: change of the judge's loss}}; losses: {judge: its loss before}. Centre and spread are the
    shortest half's, so they hold while most clients are honest; a judge that is easily upset counts no more for it.
    """
    standard: dict[str, list[float]] = {client: [] for client in effects}
    for judge, loss in losses.items():
        mine = {client: found[judge] for client, found in effects.items() if judge in found}
        centre, spread = shorth(torch.tensor(list(mine.values()), dtype=torch.float64))
        spread = max(spread, LEAST_SPREAD * abs(loss), 1e-12)
        for client, effect in mine.items():
            standard[client].append((effect - centre) / spread)
    return {client: median(values) for client, values in standard.items()}


def harm_scores(harm: Mapping[str, float]) -> dict[str, float]:
    """{client: robust z of its harm among the clients}, by the shortest half again."""
    centre, spread = shorth(torch.tensor(list(harm.values()), dtype=torch.float64))
    return {client: (value - centre) / max(spread, LEAST_HARM) for client, value in harm.items()}


def _loss(scorer: "Scorer", state: AdapterState, split: Any) -> float:
    """A loss that can be computed with: one that is not finite is as bad as can be."""
    loss = scorer.metrics(state, split)["loss"]
    return min(loss, BROKEN) if not math.isnan(loss) else BROKEN
