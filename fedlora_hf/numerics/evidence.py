"""Evidence against a client: the kinds there are, and one finding of one kind."""
# SPDX-License-Identifier: Apache-2.0

from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What a piece of evidence rests on, in the order in which it is shown. The values are those of run.json."""

    SUBSPACE = "subspace"  # how little the update uses the subspace that the majority shares
    DIRECTION = "direction"  # how little it points where the majority points
    SCALE = "scale"  # how large or small it is
    FUNCTIONAL = "functional"  # what it does to other clients' validation loss
    DRIFT = "drift"  # how much further from the majority it is than the client's earlier ones; flags nobody


# The kinds that updates tell by themselves; the functional one takes evaluations on clients' data.
OF_UPDATES = (Kind.SUBSPACE, Kind.DIRECTION, Kind.SCALE)


class Evidence(NamedTuple):
    """One kind of evidence against one client: flagged when `score` > `threshold` (None: kind not usable here)."""

    score: float
    threshold: float | None

    @property
    def flagged(self) -> bool:
        return self.threshold is not None and self.score > self.threshold
