"""What a method says of itself: the record beside each rule, read by the registry, the card and the README."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.update import Aggregate


@dataclass(frozen=True)
class NoOptions:
    """A method with nothing to set."""


@dataclass(frozen=True)
class Method:
    """One aggregation rule.

    averages: "factors" when A and B are combined separately (inexact: the mean of products is not the product of
        means), "product" when the updates B A themselves are.
    rule: (cohort, options) -> Aggregate, a pure function.
    options: the frozen dataclass of its options; its fields are the keyword arguments of `aggregate`.
    trains: the factors a client trains; turns: those of round 1, 2 ... in turn, where they change.
    keeps: the factors a client keeps for itself between rounds.
    residual: the global adapter's first rows are what clients train next; the rest stands frozen under these.
    restarts: clients start every round from fresh factors on top of the frozen aggregate.
    robust: made to withstand contaminated clients.
    weighted: the global adapter is a mean with `Aggregate.weights` (a coordinate-wise median is not).
    least_clients: fewest usable updates it can work with.
    needs_server: compares clients with an update trained on the server's own data.
    """

    name: str
    title: str
    paper: str
    averages: Literal["factors", "product"]
    rule: Callable[[Cohort, Any], Aggregate]
    options: type = NoOptions
    trains: tuple[str, ...] = ("A", "B")
    turns: tuple[tuple[str, ...], ...] = ()
    keeps: tuple[str, ...] = ()
    residual: bool = False
    restarts: bool = False
    robust: bool = False
    weighted: bool = True
    least_clients: int = 1
    needs_server: bool = False

    def trained(self, number: int) -> tuple[str, ...]:
        """The factors that clients train in a round (rounds count from 1)."""
        return self.turns[(number - 1) % len(self.turns)] if self.turns else self.trains
