"""What a method says of itself: the record beside each rule, read by the registry, the card and the README."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.counts import Trust
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
    trains: the factors a client trains; keeps: the factors a client keeps for itself between rounds.
    restarts: clients start every round from fresh factors on top of the frozen aggregate.
    robust: made to withstand contaminated clients.
    weighted: the global adapter is a mean with `Aggregate.weights` (a coordinate-wise median is not).
    least_clients: fewest usable updates it can work with.
    """

    name: str
    title: str
    paper: str
    averages: Literal["factors", "product"]
    rule: Callable[[Cohort, Any], Aggregate]
    options: type = NoOptions
    trains: tuple[str, ...] = ("A", "B")
    keeps: tuple[str, ...] = ()
    restarts: bool = False
    robust: bool = False
    weighted: bool = True
    least_clients: int = 1

    @property
    def counts(self) -> Trust:
        """What it makes of the clients' numbers of examples; see `aggregation.counts`."""
        return "trusted" if not self.robust else "capped" if self.weighted else "unused"
