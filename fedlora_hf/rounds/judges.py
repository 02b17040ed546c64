"""Functional evidence: what a client's change does to the validation loss of other clients, in numbers alone.

A contaminated update may look like what an honest minority would send; what it does to others' loss tells more. Every
update is judged where it would act: half of it is put in the place of half of the influence-weighted mean, and compared
with nothing put there. Who measures the losses does not matter: this process (`judging.py`) or clients elsewhere.
Measured: docs/results/judges.
"""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedlora_hf.numerics.evidence import Evidence
from fedlora_hf.update import AdapterState

# The share of a client's update in what is judged.
MIXED = 0.5
# Help is a measure where the typical client's share lowers others' loss by at least this part of it.
LEAST_HELP = 0.01
# A client is flagged when its share takes more than this part of what the whole round gives the others. Its influence
# falls long before (`numerics.clair.influence.trust`): single honest clients with few examples harm others too.
HARM = 0.3
# What counts as a loss that is not finite, in nats.
BROKEN = 1e6

Losses = Mapping[str, float]  # {judge: its loss, nats}


@dataclass(frozen=True)
class Effect:
    """What a client's share does to others: `raised` of `judges` others lose by it, and the median of their relative
    changes of loss (0.014: 1.4 % more). Both against the mean without it."""

    raised: int
    judges: int
    change: float


@dataclass(frozen=True)
class Functional:
    """evidence: {client: Evidence}: what a client's share takes of what the round gives the others; 0 for one that does
    what nothing would do, below 0 for one that helps. effects: {client: Effect}, of those whom anybody judged. facts:
    who judged, at what cost, as the record has it."""

    evidence: Mapping[str, Evidence] = field(default_factory=dict)
    effects: Mapping[str, Effect] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def functional_evidence(
    start: Losses, mean: Losses, diluted: Losses, mixed: Mapping[str, Losses], influence: Mapping[str, float]
) -> Functional:
    """Evidence from the judges' losses, a matrix of clients by judges and three rows beside it.

    start, mean: {judge: its loss} under the adapter that the round started from, and under the mean of this round's
        updates weighted by influence. diluted: under the mean with MIXED of it replaced by the start, as by a client
        that changed nothing. mixed: {client: {judge: loss}} under the mean with MIXED of it replaced by the client's
        update; a judge's own client is not judged by it, whether it is there or not.
    influence: {client: what is left of its influence on the evidence of updates, 0 to 1}: what its word weighs as well.
        Judges of none are not heard.

    Every number is a weighted median over judges, the lower one where two would do, so a client is flagged only if
    judges of more than half of the weight find that it harms them: liars of less than half flag nobody, and clear
    nobody. Where nobody can judge, in a cohort of fewer than 3, and where the round or the typical client's share in it
    help too little, the threshold is None.
    """
    heard = {judge: influence.get(judge, 0.0) for judge in sorted(mean) if influence.get(judge, 0.0) > 0}
    start, mean, diluted = ({judge: bounded(row[judge]) for judge in heard} for row in (start, mean, diluted))
    scores: dict[str, Evidence] = {}
    effects: dict[str, Effect] = {}
    harm: dict[str, float] = {}
    for client, row in sorted(mixed.items()):
        scores[client] = Evidence(0.0, None)
        others = {judge: weight for judge, weight in heard.items() if judge != client and judge in row}
        if others:
            losses = {judge: bounded(row[judge]) for judge in others}
            harm[client] = weighted_median((losses[j] - diluted[j], w) for j, w in others.items())
            change = weighted_median((losses[j] / max(mean[j], 1e-12) - 1, w) for j, w in others.items())
            effects[client] = Effect(sum(losses[j] > mean[j] for j in others), len(others), change)
    if len(harm) >= 3:
        level = weighted_median((mean[judge], weight) for judge, weight in heard.items())
        given = weighted_median((start[judge] - mean[judge], weight) for judge, weight in heard.items())
        counts = {client: influence.get(client, 0.0) for client in harm}
        typical = -weighted_median((_typical(mixed, diluted, judge, counts), w) for judge, w in heard.items())
        if min(given, typical) >= LEAST_HELP * level:
            scores |= {client: Evidence(found / given, HARM) for client, found in harm.items()}
    return Functional(scores, effects)


def _typical(mixed: Mapping[str, Losses], diluted: Losses, judge: str, counts: Mapping[str, float]) -> float:
    """What one judge finds of the typical client's share, clients weighed by their influence; positive is harm."""
    heard = [(mixed[client][judge], weight) for client, weight in counts.items() if judge in mixed[client]]
    return weighted_median((bounded(loss) - diluted[judge], weight) for loss, weight in heard) if heard else 0.0


def weighted_median(items: Iterable[tuple[float, float]]) -> float:
    """The least of the values at or below which lies half of the weight. items: (value, weight of 0 or more); values
    of no weight count only where none has any, and then alike."""
    pairs = sorted(items)
    total = math.fsum(weight for _, weight in pairs)
    pairs, total = (pairs, total) if total > 0 else ([(value, 1.0) for value, _ in pairs], float(len(pairs)))
    below = 0.0
    for value, weight in pairs:
        below += weight
        if weight and 2 * below >= total * (1 - 1e-12):
            return value
    return pairs[-1][0]


def bounded(loss: float) -> float:
    """A loss that can be computed with: one that is not finite is as bad as can be."""
    return min(loss, BROKEN) if not math.isnan(loss) else BROKEN


def mixture(mean: AdapterState, update: AdapterState) -> AdapterState:
    """The mean with MIXED of it replaced by a client's whole adapter, at the ranks of the mean; extras alike."""
    factors = {}
    for module, own in mean.items():
        both = own * (1 - MIXED) + update[module] * MIXED
        factors[module] = both.truncated(own.rank, own.scale or 1.0)[0]  # no change at all may be written with scale 0
    extras = {name: tensor * (1 - MIXED) + update.extras[name] * MIXED for name, tensor in mean.extras.items()}
    return AdapterState(factors, extras)
