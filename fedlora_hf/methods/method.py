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
    trains: the factors a client trains; turns: those of round 1, 2 ... in turn, where they change.
    keeps: the factors a client keeps for itself between rounds.
    residual: the global adapter's first rows are what clients train next; the rest stands frozen under these.
    restarts: clients start every round from fresh factors on top of the frozen aggregate.
    robust: made to withstand contaminated clients.
    weighted: the global adapter is a mean with `Aggregate.weights` (a coordinate-wise median is not).
    uniform: every client counts once, whatever number of examples it claims.
    least_clients: fewest usable updates it can work with.
    needs_server: compares clients with an update trained on the server's own data.
    global_adapter: what the global adapter is, in one sentence, where the method itself has none; else "".
    rule: (cohort, options) -> Aggregate, a pure function, for a method whose rule is kept elsewhere; else None.
    """

    name: str
    title: str
    paper: str
    averages: Literal["factors", "product"]
    options: type = NoOptions
    trains: tuple[str, ...] = ("A", "B")
    turns: tuple[tuple[str, ...], ...] = ()
    keeps: tuple[str, ...] = ()
    residual: bool = False
    restarts: bool = False
    robust: bool = False
    weighted: bool = True
    uniform: bool = False
    least_clients: int = 1
    needs_server: bool = False
    global_adapter: str = ""
    rule: Callable[[Any, Any], Any] | None = None

    def trained(self, number: int) -> tuple[str, ...]:
        """The factors that clients train in a round (rounds count from 1)."""
        return self.turns[(number - 1) % len(self.turns)] if self.turns else self.trains

    @property
    def counts(self) -> Trust:
        """What it makes of the clients' numbers of examples."""
        return "trusted" if not self.robust else "unused" if self.uniform else "capped"
