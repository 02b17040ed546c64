"""What a client starts a round from, and what a round's updates come to."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fedlora_hf.update import AdapterState, Aggregate, ClientUpdate


@dataclass(frozen=True, eq=False)
class Start:
    """What a client starts a round from. frozen: an adapter that stands frozen under the trained one (None: none)."""

    state: AdapterState
    frozen: AdapterState | None = None


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a round's updates come to, before anything is changed.

    state: the next global adapter. start: the adapter that the clients' updates are compared with. usable: the updates
    it rests on, flagged ones among them. quarantined: {client: reason}, those that failed included.
    memory: what the server remembers after the round: its optimizer's state, SCAFFOLD's control variate.
    """

    state: AdapterState
    start: AdapterState
    combined: Aggregate
    usable: Sequence[ClientUpdate]
    quarantined: Mapping[str, str]
    memory: Mapping[str, Tensor] = field(default_factory=dict)
