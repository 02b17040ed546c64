"""The two figures of the attack table, from the rows of attacks.csv."""
# SPDX-License-Identifier: Apache-2.0

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes

from scripts.experiments.drawing import COLOURS, MARKS, bar, figure, heat, log_axis, save

if TYPE_CHECKING:
    from scripts.experiments.attack_report import Table

# Loss that is as bad as any: above it, cells look alike.
WORST = 10.0
SERIES = {
    "alone": ("local", "personal_loss"),
    "FedAvg": ("fedavg", "global_loss"),
    "CLAIR, global": ("clair hard", "global_loss"),
    "CLAIR, each client's choice": ("clair soft", "chosen_loss"),
}


def draw_global(table: "Table", file: Path) -> None:
    """Heat map: loss of every rule's global adapter under every attack, where a third is contaminated."""
    count = table.counts[-2] if len(table.counts) > 2 else table.counts[-1]
    cells, rules = table.at(count), list(table.combining)
    canvas = figure(2.6 + 5.6 * len(table.regimes), 1.9 + 0.32 * len(rules))
    panels = canvas.subplots(1, len(table.regimes), squeeze=False)[0]
    for number, (axes, regime) in enumerate(zip(panels, table.regimes, strict=True)):
        values = np.array([[table.mean(regime, c, r, "global_loss") for c in cells] for r in rules])
        names = list(table.combining.values()) if number == 0 else [""] * len(rules)
        attacks = [cell[0] for cell in cells]
        image = heat(axes, values, names, attacks, (0.5, 7), text=_number, logarithmic=True, turned=True)
        axes.set_title(f"{regime} data, {count} of {table.clients} contaminated", fontsize=10)
    bar(canvas, image, panels, "honest clients' loss, nats per letter", (0.5, 1, 2, 4, 7))
    save(canvas, file)


def _number(value: float) -> str:
    return f"{value:.2f}" if value < WORST else f"{value:.0f}"


def draw_personal(table: "Table", file: Path) -> None:
    """What benign clients end up with under every attack at the largest share: alone, FedAvg, CLAIR."""
    count = table.counts[-1]
    cells = table.at(count)
    canvas = figure(5.2 * len(table.regimes), 1.6 + 0.36 * len(cells))
    panels = canvas.subplots(1, len(table.regimes), squeeze=False, sharey=True)[0]
    for axes, regime in zip(panels, table.regimes, strict=True):
        for number, (title, (rule, column)) in enumerate(SERIES.items()):
            values = [table.values(regime, cell, rule, column) for cell in cells]
            _dots(axes, values, (number - 1.5) * 0.17, number, title)
        log_axis(axes.xaxis)
        axes.set_xlabel("loss, nats per letter")
        axes.set_title(f"{regime} data, {count} of {table.clients} contaminated", fontsize=10)
        axes.grid(axis="x", alpha=0.25)
        for boundary in range(1, len(cells)):
            axes.axhline(boundary - 0.5, color="0.88", linewidth=0.8, zorder=0)
    panels[0].set_yticks(range(len(cells)), [cell[0] for cell in cells], fontsize=9)
    panels[0].set_ylim(len(cells) - 0.5, -0.5)
    canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    save(canvas, file)


def _dots(axes: Axes, values: Sequence[Sequence[float]], shift: float, number: int, label: str) -> None:
    """Means, and bars from the smallest to the largest of the seeds."""
    kept = [(place + shift, own) for place, own in enumerate(values) if own]
    means = [statistics.fmean(own) for _, own in kept]
    below = [mean - min(own) for mean, (_, own) in zip(means, kept, strict=True)]
    above = [max(own) - mean for mean, (_, own) in zip(means, kept, strict=True)]
    places = [place for place, _ in kept]
    style = {"fmt": MARKS[number], "color": COLOURS[number], "markersize": 5, "linewidth": 1.2}
    axes.errorbar(means, places, xerr=[below, above], label=label, **style)
