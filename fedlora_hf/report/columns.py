"""Clients side by side on one axis: positions and names that stay readable from 1 client to 1,000."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from fedlora_hf.report.style import WIDTH, Theme, label
from fedlora_hf.report.view import FLAGGED, Client

_BESIDE = 0.8  # inches of a figure's width that are not axis
_PITCH = 0.15  # inches a name needs when it stands upright
_WHOLE_LABEL = "clients in the order of their ids, flagged ones last"
_LETTER = 0.075  # inches a letter needs when it lies


@dataclass(frozen=True)
class Columns:
    """Where each client stands. Flagged clients come last; named: places of the clients whose names fit."""

    clients: list[Client]
    places: list[float]
    named: list[int]
    divider: float | None
    axis: float  # inches

    @classmethod
    def of(cls, clients: Sequence[Client], width: float = WIDTH) -> "Columns":
        """Every name, where there is room; else the flagged clients are spread until their names fit; else no name."""
        flagged = sum(client.state == FLAGGED for client in clients)
        honest = len(clients) - flagged
        axis = width - _BESIDE
        room = max(1, int(axis / _PITCH))
        if len(clients) <= room:
            pitch, named = 1.0, list(range(len(clients)))
        elif flagged <= room * 2 // 3:
            pitch, named = max(1.0, honest / (room - flagged)), list(range(honest, len(clients)))
        else:
            pitch, named = 1.0, []
        gap = 0.01 * len(clients) if flagged and honest else 0.0
        first = honest + gap + (pitch - 1) / 2
        places = [float(i) for i in range(honest)] + [first + pitch * i for i in range(flagged)]
        return cls(list(clients), places, named, honest - 0.5 + gap / 2 if gap else None, axis)

    def of_state(self, state: str) -> list[tuple[float, Client]]:
        return [pair for pair in zip(self.places, self.clients, strict=True) if pair[1].state == state]

    @property
    def names(self) -> list[str]:
        return [label(self.clients[i].id, 20) for i in self.named]

    @property
    def lying(self) -> bool:
        """Whether the names fit side by side without being turned upright."""
        return max(map(len, self.names), default=0) * _LETTER < self.axis / (len(self.clients) + 0.2)

    @property
    def footing(self) -> float:
        """Inches that the names take under the axis."""
        return 0.2 if self.lying else max(map(len, self.names), default=0) * _LETTER

    def dress(self, axes: Axes, theme: Theme, last: bool) -> None:
        """Limits, the line before the flagged clients and, under the last axes, the names."""
        first, end = self.places[0], self.places[-1]
        margin = max(0.6, 0.012 * (end - first))
        axes.set_xlim(first - margin, end + margin)
        if self.divider is not None:
            axes.axvline(self.divider, color=theme.muted, lw=0.8, ls=":")
        names = self.names if last else [""] * len(self.named)
        axes.set_xticks([self.places[i] for i in self.named], names, fontsize=8)
        axes.tick_params(axis="x", length=0, rotation=0 if self.lying else 90)
        for tick, i in zip(axes.get_xticklabels(), self.named, strict=True):
            tick.set_color(theme.bad if self.clients[i].state == FLAGGED else theme.ink)
        if last and len(self.named) < len(self.clients):
            named = ", only these named" if self.named else ""
            axes.set_xlabel(f"clients in order, flagged last{named}" if theme.narrow else _WHOLE_LABEL + named)
