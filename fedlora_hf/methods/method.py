"""What a method says of itself: the facts that the registry, the command line, the card and the README read."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

# What a method makes of clients' numbers of examples. capped: held to weight_cap times the median. trusted: taken as
# they are, unless they cannot be. unused: every client counts once. See `aggregation.counts`.
Trust = Literal["capped", "trusted", "unused"]
SAID: dict[Trust, str] = {
    "capped": "numbers of examples are claims: none counts more than weight_cap times the cohort's median",
    "trusted": "clients' numbers of examples are trusted: who claims ten times as many weighs ten times as much",
    "unused": "every client counts once, whatever number of examples it claims",
}


@dataclass(frozen=True)
class NoOptions:
    """It has none."""


@dataclass(frozen=True)
class Method:
    """One aggregation method. Its rule is the function of its name in `fedlora_hf/aggregation/<name>.py`.

    averages: "factors" when A and B are combined separately (inexact: the mean of products is not the product of
        means), "product" when the updates B A themselves are.
    options: the frozen dataclass of its options; its fields are the keyword arguments of `aggregate`.
    trains: the factors a client trains; keeps: the factors a client keeps for itself between rounds.
    restarts: clients start every round from fresh factors on top of the frozen aggregate.
    robust: made to withstand contaminated clients.
    weighted: the global adapter is a mean with `Aggregate.weights` (a coordinate-wise median is not).
    least_clients: fewest usable updates it can work with.
    rule: (cohort, options) -> Aggregate, a pure function, for a method whose rule is kept elsewhere; else None.
    """

    name: str
    title: str
    paper: str
    averages: Literal["factors", "product"]
    options: type = NoOptions
    trains: tuple[str, ...] = ("A", "B")
    keeps: tuple[str, ...] = ()
    restarts: bool = False
    robust: bool = False
    weighted: bool = True
    least_clients: int = 1
    rule: Callable[[Any, Any], Any] | None = None

    @property
    def counts(self) -> Trust:
        """What it makes of the clients' numbers of examples."""
        return "trusted" if not self.robust else "capped" if self.weighted else "unused"
