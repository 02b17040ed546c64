"""From scores to flags: robust spread, guards on the size of the effect, and evidence combined over rounds.

Every score says how far a client is FROM THE MAJORITY. A client is flagged when one score exceeds its threshold; a
threshold of None says that the kind of evidence is not usable here. How the constants were set: docs/clair.md.
"""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedlora_hf.numerics.evidence import Evidence

# A client is flagged when it is unrelated to the majority: when it has less than 15 % of what the core shares, or
# no more than chance explains (an unrelated client scores 1, give or take its error). Being an outlier is not enough:
# honest minorities are outliers. Where ERRORS of these errors leave less than LEAST_CAP, only opposition is flagged.
CAP, LEAST_CAP, ERRORS = 0.85, 0.7, 3.0
# Where no client of the core has more than EXACT of its energy outside the subspace, the model holds to the last digit,
# and a client is flagged with this much less than the core has inside.
EXACT, EXACT_GUARD = 1e-6, 0.2
# Opposed to the core (the core's negative scores 2): what a client that lives in the majority's subspace, or one that
# noise could have turned away, must exceed to be flagged for its direction.
OPPOSED, OPPOSED_CAP = 1.3, 1.7
# Size: 5 times the typical norm, or 1 / 100 of it.
LARGE, SMALL = math.log(5.0), math.log(100.0)
# However unequal the clients' norms, one of LARGE ** SCALE_CAP (7.5) times the typical norm is flagged.
SCALE_CAP = 1.25
# Log norm ratio given to a zero update, so that scores stay finite.
ZERO = math.log(1e6)


def shorth(x: Tensor) -> tuple[float, float]:
    """(centre, spread) from the shortest half of x: breaks down only when half of it is bad. Spread is scaled to the
    standard deviation of a normal sample."""
    ordered = x.sort().values
    size = len(ordered) // 2 + 1
    width = ordered[size - 1 :] - ordered[: len(ordered) - size + 1]
    start = int(width.argmin())
    half = ordered[start : start + size]
    return float(half.median()), float(width[start]) / 2 / 0.6745


def critical_z(n: int) -> float:
    """Robust z that a clean client exceeds with probability of about 1 / 1000 in a normal sample of n: the shorth of
    few is often far too short. Fitted to simulations (scripts/experiments/calibrate_flags.py)."""
    return 3.4 + 60.0 / n


def stranger_threshold(scores: Tensor, errors: Tensor) -> Tensor:
    """(K,) thresholds of a score that is 0 at the core, 1 for an unrelated client and 2 for the core's negative.

    errors: (K,) standard errors of an unrelated client's score.
    """
    cap = (1 - ERRORS * errors).clamp_max(CAP)
    return torch.where(cap >= LEAST_CAP, cap, torch.maximum(1 + ERRORS * errors, opposed_threshold(scores)))


def opposed_threshold(scores: Tensor) -> Tensor:
    """Scalar: score from which a client counts as opposed, by the robust spread between OPPOSED and OPPOSED_CAP."""
    centre, spread = shorth(scores)
    return scores.new_tensor(min(max(centre + critical_z(len(scores)) * spread, OPPOSED), OPPOSED_CAP))


def scale_scores(log_norm: Tensor, alive: Tensor) -> tuple[Tensor, float]:
    """((K,) scores, threshold) from log norms: 1 is LARGE times bigger, or SMALL times smaller, than is typical."""
    centre, spread = shorth(log_norm[alive])
    deviation = torch.where(alive, log_norm - centre, torch.full_like(log_norm, -ZERO)).clamp(-ZERO, ZERO)
    scores = torch.where(deviation > 0, deviation / LARGE, -deviation / SMALL)
    return scores, min(max(1.0, critical_z(int(alive.sum())) * spread / LARGE), SCALE_CAP)


def accumulate(
    rounds: Sequence[Mapping[str, Mapping[str, tuple[float, float | None]]]],
    decay: float = 1.0,
    memory: int | None = None,
) -> dict[str, dict[str, Evidence]]:
    """Evidence over rounds: {client: {kind: Evidence}} from a list of the same, oldest first.

    The combined score is the mean over the rounds in which the kind was usable for the client of score / threshold,
    each held to [-4, 4] so that no single round can condemn or clear for good; its threshold is 1. `decay` < 1 gives a
    round that is t rounds old the weight decay^t; `memory`: only a client's last so many usable ones of a kind are
    looked at. A kind never usable keeps the threshold None. Rounds in which a client took no part say nothing about
    it.
    """
    sums: dict[str, dict[str, list[float]]] = {}
    for age, evidence in enumerate(reversed(list(rounds))):
        for client, kinds in evidence.items():
            for kind, (score, threshold) in kinds.items():
                total = sums.setdefault(client, {}).setdefault(kind, [0.0, 0.0, 0])
                if threshold is not None and threshold > 0 and (memory is None or total[2] < memory):
                    total[2] += 1
                    total[0] += decay**age * min(max(score / threshold, -4.0), 4.0)
                    total[1] += decay**age
    return {
        client: {kind: Evidence(s / w, 1.0) if w else Evidence(0.0, None) for kind, (s, w, _) in sorted(kinds.items())}
        for client, kinds in sorted(sums.items())
    }
