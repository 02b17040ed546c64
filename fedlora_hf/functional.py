"""Functional evidence: what a client's change does to the validation loss of other clients.

Updates alone cannot tell different from contaminated where honest clients share nothing; the loss of others sometimes
can, because an honest change costs others less than a spoiled one. It needs evaluations, so it is sub-sampled.
"""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
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
# Spread of honest clients' effects, relative to the typical loss, below which differences count for nothing.
LEAST_SPREAD = 0.002
# What counts as the change of loss where a loss is not finite any more.
BROKEN = 1e6


@dataclass(frozen=True)
class Functional:
    """evidence: {client: Evidence}, in standard deviations. changes: {client: {scale: median change of the judges'
    loss, nats; positive is harm}}. evaluations: how many splits were scored for it."""

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
        scored as an adapter of the model's rank, exact at scale 1 and wherever the start is still zero.
    validation: {client: its tokenised validation split}; clients without one, or with an empty one, judge nobody.
    judges: how many other clients judge a client, drawn from (seed, client). The median over them holds while fewer
        than half of those drawn are contaminated, so few judges are cheap and weak.

    Costs one evaluation for each judge that was drawn, and clients * judges * scales more. A client whom nobody can
    judge, or cohorts of fewer than 3, get the threshold None.
    """
    updates = sorted(updates, key=lambda update: update.client_id)
    able = sorted(client for client, split in validation.items() if split is not None and len(split))
    panel = {update.client_id: drawn_judges(update.client_id, able, judges, seed) for update in updates}
    loss = _counted(lambda state, judge: scorer.metrics(state, validation[judge])["loss"])
    before = {judge: loss(start, judge) for judge in sorted({judge for drawn in panel.values() for judge in drawn})}
    changes: dict[str, dict[float, float]] = {}
    for update in updates:
        drawn = panel[update.client_id]
        if not drawn:
            continue
        state = update.state.in_memory()
        changes[update.client_id] = {}
        for scale in scales:
            moved = state if scale == 1 else mix(start, state, scale, scorer.rank)
            effects = [_finite(loss(moved, judge) - before[judge]) for judge in drawn]
            changes[update.client_id][scale] = median(effects)
    scores = harm_scores(changes, median(before.values())) if len(changes) >= 3 else {}
    limit = critical_z(len(scores)) if scores else None
    evidence = {
        update.client_id: Evidence(scores[update.client_id], limit)
        if update.client_id in scores
        else Evidence(0.0, None)
        for update in updates
    }
    return Functional(evidence, changes, loss.count)


def drawn_judges(client: str, able: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` of the others that are able to judge, or all of them; sorted, and the same whoever else is judged."""
    others = [judge for judge in able if judge != client]
    rng = np.random.default_rng(derive_seed(seed, "judges", client))
    return sorted(others[place] for place in rng.permutation(len(others))[:count])


def harm_scores(changes: Mapping[str, Mapping[float, float]], typical_loss: float) -> dict[str, float]:
    """{client: the largest over scales of (its effect - the typical effect) / spread}, at most 0 for one that harms
    nobody [our choice].

    Centre and spread are those of the shortest half of the clients, so they hold while most are honest; the spread is
    at least LEAST_SPREAD of the typical loss, because judges' losses are never known better.
    """
    scores = dict.fromkeys(changes, -math.inf)
    for scale in next(iter(changes.values())):
        effects = {client: effect[scale] for client, effect in changes.items()}
        centre, spread = shorth(torch.tensor(list(effects.values()), dtype=torch.float64))
        spread = max(spread, LEAST_SPREAD * abs(typical_loss), 1e-12)
        for client, effect in effects.items():
            z = (effect - centre) / spread
            scores[client] = max(scores[client], z if effect > 0 else min(z, 0.0))
    return scores


class _Counted:
    """A function that knows how often it was called."""

    def __init__(self, function: Callable[[AdapterState, str], float]) -> None:
        self.function, self.count = function, 0

    def __call__(self, state: AdapterState, judge: str) -> float:
        self.count += 1
        return self.function(state, judge)


def _counted(function: Callable[[AdapterState, str], float]) -> _Counted:
    return _Counted(function)


def _finite(change: float) -> float:
    return min(max(change, -BROKEN), BROKEN) if not math.isnan(change) else BROKEN
