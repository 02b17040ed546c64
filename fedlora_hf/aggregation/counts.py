"""How far a client's number of examples is believed: one rule for every method, engine and command."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping
from math import floor, inf, isinf
from statistics import median
from typing import NamedTuple

from fedlora_hf.methods.method import Trust

WEIGHT_CAP = 3.0
# A plain mean is defined by its counts, but one that leaves all others without a say is no count [our choice].
IMPLAUSIBLE = 1000


class Counts(NamedTuple):
    """used: {client id: the number of examples it is weighed with}. outliers: {client id: one line} of those who claim
    more than weight_cap times the cohort's median, believed or not. Both sorted as the claims are."""

    used: dict[str, int]
    outliers: dict[str, str]


def limited(weights: Mapping[str, float], limits: Mapping[str, float]) -> dict[str, float]:
    """Weights that sum to 1, those of the clients in `limits` held to so many times the median weight that is not 0:
    whoever is left out of the mean is typical of nothing in it.

    For rules whose weights grow faster than the counts they are given, such as the geometric median, which moves to
    where the most weight lies. Without limits the weights as they are, to the bit.
    """
    told = [weight for weight in weights.values() if weight > 0]
    if not limits or not told:
        return dict(weights)
    middle = median(told)
    held = {client: min(weight, limits.get(client, inf) * middle) for client, weight in weights.items()}
    total = sum(held.values())
    return {client: weight / total for client, weight in held.items()}


def believed(claims: Mapping[str, int], cap: float, trust: Trust) -> Counts:
    """What clients' claims {client id: number of examples} count for.

    cap: at least 1; inf believes every claim. The median is that of all claims, so no minority moves it far: two
    clients alone have none to speak of, and are believed. When no claim is above `cap` times the median, `used` is
    the claims. Source: our choice.
    """
    if not claims or isinf(cap):
        return Counts(dict(claims), {})
    middle = median(claims.values())
    most = floor(cap * middle)
    used, outliers = {}, {}
    for client, claim in claims.items():
        used[client] = claim
        if claim <= cap * middle:
            continue
        said = f"claims {claim} examples, {claim / middle:.3g} times the cohort's median of {middle:g}"
        if trust == "unused":
            outliers[client] = f"{said}: not used, every client counts once"
        elif trust == "trusted" and claim <= IMPLAUSIBLE * middle:
            outliers[client] = f"{said}: believed, the method trusts counts"
        else:
            used[client] = most
            outliers[client] = f"{said}: counted as {most} (weight_cap {cap:g})"
    return Counts(used, outliers)
