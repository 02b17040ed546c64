"""Functional evidence: what a client's change does to the validation loss of other clients.

A contaminated update may look like what an honest minority would send; what it does to others' loss tells more, where
honest clients help each other: a client that harms others there is flagged. It takes evaluations, so only a panel of
clients judges. Measured: docs/results/rounds (it finds permuted and colluding labels) and docs/results/validity_map (it
says nothing where honest clients hardly help each other, and lying judges can outvote the others).
"""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora_hf.numerics.evidence import Evidence
from fedlora_hf.update import AdapterState, ClientUpdate
from fedlora_hf.util.seeding import derive_seed

if TYPE_CHECKING:
    from fedlora_hf.training.scorer import Scorer

# Help is a measure where the typical client lowers others' loss by at least this share of it [our choice].
LEAST_HELP = 0.01
# A client is flagged when it harms others by more than this share of what the typical client helps them [our choice].
HARM = 0.1
# What counts as the change of a loss that is not finite any more, in nats.
BROKEN = 1e6


@dataclass(frozen=True)
class Functional:
    """evidence: {client: Evidence}: score 0 for one that helps as the typical client does, 1 for one that helps nobody.
    changes: {client: median over its judges of the change of their loss, nats; positive is harm}. evaluations: how
    many splits were scored for it."""

    evidence: Mapping[str, Evidence]
    changes: Mapping[str, float]
    evaluations: int


def functional_evidence(
    scorer: "Scorer",
    start: AdapterState,
    updates: Iterable[ClientUpdate],
    validation: Mapping[str, Any],
    *,
    judges: int = 5,
    seed: int = 0,
) -> Functional:
    """What each client's change does to others' validation loss, against what the typical client's does.

    start: the adapter the round started from; updates: whole adapters, read one at a time.
    validation: {client: its tokenised validation split}; clients without one, or with an empty one, judge nobody.
    judges: how many other clients judge each client. One panel of judges + 1, drawn from the seed, judges all, none of
        them itself. Its median holds while fewer than half of the panel are contaminated; draw another every round.

    Costs one evaluation for each of the panel, and clients * judges more. Clients whom nobody can judge, and all in a
    cohort of fewer than 3, or whose typical client helps others by less than LEAST_HELP, get the threshold None.
    """
    panel = drawn_panel(validation, judges + 1, seed)
    before = {judge: _loss(scorer, start, validation[judge]) for judge in panel}
    changes: dict[str, float] = {}
    scores: dict[str, Evidence] = {}
    evaluations = len(before)
    for update in sorted(updates, key=lambda update: update.client_id):
        scores[update.client_id] = Evidence(0.0, None)
        if others := [judge for judge in panel if judge != update.client_id]:
            state = update.state.in_memory()
            effects = [_loss(scorer, state, validation[judge]) - before[judge] for judge in others]
            changes[update.client_id] = median(effects)
            evaluations += len(effects)
    if len(changes) >= 3:
        scores |= judged(changes, median(before.values()))
    return Functional(scores, changes, evaluations)


def judged(changes: Mapping[str, float], loss: float) -> dict[str, Evidence]:
    """Evidence from what every client's change does to others' loss (nats, positive is harm), and that loss before."""
    help_of_most = -median(changes.values())
    if help_of_most < LEAST_HELP * abs(loss):
        return dict.fromkeys(changes, Evidence(0.0, None))
    return {client: Evidence(1 + change / help_of_most, 1 + HARM) for client, change in changes.items()}


def drawn_panel(validation: Mapping[str, Any], count: int, seed: int) -> list[str]:
    """`count` of the clients that have validation examples, or all of them; sorted, a function of the seed."""
    able = sorted(client for client, split in validation.items() if split is not None and len(split))
    order = np.random.default_rng(derive_seed(seed, "judges")).permutation(len(able))
    return sorted(able[place] for place in order[:count])


def _loss(scorer: "Scorer", state: AdapterState, split: Any) -> float:
    """A loss that can be computed with: one that is not finite is as bad as can be."""
    loss = scorer.metrics(state, split)["loss"]
    return min(loss, BROKEN) if not math.isnan(loss) else BROKEN
