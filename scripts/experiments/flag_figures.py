"""The figure of `calibrate_flags.py`: who is flagged wrongly and who is missed, over family and number of clients."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.experiments.drawing import bar, figure, heat, save

Row = Mapping[str, Any]
KINDS = ("own subspace", "coherent", "sign flip")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Worst share of clean clients flagged, and of contaminated ones missed at 40 %, each with its own colour bar."""
    names = list(dict.fromkeys(str(row["family"]) for row in rows))
    sizes = sorted({int(row["K"]) for row in rows})

    def grid(chosen: Callable[[Row], bool], worst: Callable[[Row], float]) -> list[list[float]]:
        return [
            [max(worst(r) for r in rows if r["family"] == n and int(r["K"]) == K and chosen(r)) for K in sizes]
            for n in names
        ]

    canvas = figure(12, 1.7 + 0.34 * len(names))
    panels = canvas.subplots(1, 1 + len(KINDS), sharey=True)
    columns = [str(size) for size in sizes]
    wrong = grid(lambda row: True, lambda row: float(row["false positives %"]))
    image = heat(panels[0], wrong, names, columns, (0, 5), text=_percent)
    panels[0].set_title("clean clients flagged, worst cell", fontsize=10)
    bar(canvas, image, panels[:1], "%", (0, 1, 5))
    for axes, kind in zip(panels[1:], KINDS, strict=True):
        missed = grid(
            lambda row, kind=kind: row["contaminated"] == kind and abs(float(row["share"] or 0) - 0.4) < 1e-9,  # type: ignore[misc]
            lambda row: 100 * (1 - float(row["recall"])),
        )
        image = heat(axes, missed, names, columns, (0, 100), text=_percent)
        axes.set_title(f"missed: {kind}, 40 %", fontsize=10)
    bar(canvas, image, panels[1:], "%", (0, 50, 100))
    for axes in panels:
        axes.set_xlabel("clients")
    save(canvas, path)


def _percent(value: float) -> str:
    return "" if value < 0.05 else f"{value:.1f}" if value < 9.95 else f"{value:.0f}"
