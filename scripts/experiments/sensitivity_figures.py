"""The figures of the sensitivity study, from the rows of deltas.csv and ratios.csv: three panels each."""
# SPDX-License-Identifier: Apache-2.0

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from scripts.experiments.drawing import COLOURS, GREY, figure, log_axis, save

Row = dict[str, str | int | float]
DELTAS = {
    "direction": "direction: 1 - cos",
    "magnitude": "magnitude: absolute change",
    "relative": "magnitude: relative change",
}
FACTORS = {"A": COLOURS[0], "B": COLOURS[1]}
STYLES = ("-", "--", ":")
MANY = 20  # modules that are drawn one by one
NAMES = {"dolly": "Dolly", "dolly, iid": "Dolly dealt at random", "natural_instructions": "Natural Instructions"}


def means(rows: Sequence[Row], delta: str, key: str, places: Sequence[str]) -> list[float]:
    """Mean over everything else at each value of `key`."""
    return [statistics.fmean(float(row[delta]) for row in rows if str(row[key]) == place) for place in places]


def distinct(rows: Sequence[Row], key: str) -> list[str]:
    return list(dict.fromkeys(str(row[key]) for row in rows))


def draw_ratios(found: Sequence[Row], ratios: dict[str, float], path: Path) -> None:
    """A line for each kind of data and start: filled marks between clients, hollow ones over a client's own steps."""
    rows = [row for row in found if row["axis"] == "row"]
    groups = list(dict.fromkeys((str(row["data"]), str(row["start"])) for row in rows))
    canvas = figure(11, 1.5 + 0.36 * len(groups))
    panels = canvas.subplots(1, 3, sharey=True)
    datasets = distinct(rows, "data")
    for axes, (name, published) in zip(panels, ratios.items(), strict=True):
        for y, (data, start) in enumerate(groups):
            colour = COLOURS[datasets.index(data)]
            for between, shift, face in (("clients", -0.14, colour), ("steps", 0.14, "white")):
                keys = {"data": data, "start": start, "between": between}
                own = [float(r[name]) for r in rows if all(r[k] == v for k, v in keys.items())]
                if own:
                    axes.plot([min(own), max(own)], [y + shift] * 2, color=colour, lw=1.5)
                    axes.plot(statistics.fmean(own), y + shift, "o", color=colour, mfc=face, ms=6)
        log_axis(axes.xaxis)
        axes.axvline(1, color=GREY, ls="--", lw=1)
        axes.axvline(published, color="black", lw=1.5)
        axes.annotate(f"published {published:g}", (published, 1), (-3, -2), xycoords=("data", "axes fraction"),
                      textcoords="offset points", ha="right", va="top", fontsize=8, rotation=90)  # fmt: skip
        axes.set_title(name, fontsize=10)
        axes.grid(axis="x", alpha=0.25)
    panels[0].set_yticks(range(len(groups)), [f"{NAMES.get(d, d)}, {s} start" for d, s in groups], fontsize=9)
    panels[0].set_ylim(len(groups) - 0.5, -0.5)
    marks = [Line2D([], [], marker="o", ls="", color=GREY, mfc=face) for face in (GREY, "white")]
    canvas.legend(
        marks, ["between clients", "over a client's own steps"], loc="outside lower center", ncols=2, frameon=False
    )
    save(canvas, path)


def draw_layers(rows: Sequence[Row], path: Path) -> None:
    """Between clients from the first kind of start, module by module (of a deep model layer by layer); a line style
    for each kind of data."""
    last = max(int(row["step"]) for row in rows)
    keys = {"between": "clients", "axis": "row", "start": str(rows[0]["start"])}
    chosen = [row for row in rows if int(row["step"]) == last and all(row[k] == v for k, v in keys.items())]
    deep = len(distinct(chosen, "module")) > MANY
    chosen = [{**row, "layer": _layer(str(row["module"]))} for row in chosen]
    _panels(chosen, "layer" if deep else "module", "data", path)


def draw_steps(rows: Sequence[Row], path: Path) -> None:
    """Each client against its own first snapshot, on the first kind of data; a line style for each start."""
    keys = {"between": "steps", "axis": "row", "data": str(rows[0]["data"])}
    chosen = [row for row in rows if row["start"] != "fresh, own" and all(row[k] == v for k, v in keys.items())]
    _panels(chosen, "step", "start", path)


def _panels(rows: Sequence[Row], along: str, style: str, path: Path) -> None:
    """Three panels, a delta each: A and B by colour, `style` by the kind of line."""
    canvas = figure(11, 3.9)
    panels = canvas.subplots(1, 3, sharex=True)
    kinds, places = distinct(rows, style), sorted(distinct(rows, along), key=_in_order)
    for axes, (delta, title) in zip(panels, DELTAS.items(), strict=True):
        for factor, colour in FACTORS.items():
            for kind, line in zip(kinds, STYLES, strict=False):
                own = [row for row in rows if row["factor"] == factor and str(row[style]) == kind]
                axes.plot(range(len(places)), means(own, delta, along, places), line, marker="o", ms=3.5, color=colour)
        axes.set_title(title, fontsize=10)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        _name_places(axes, along, places)
    marks = [Line2D([], [], color=colour, lw=3) for colour in FACTORS.values()]
    marks += [Line2D([], [], color=GREY, ls=line) for _, line in zip(kinds, STYLES, strict=False)]
    names = [*FACTORS, *(NAMES.get(kind, kind) + (" start" if style == "start" else "") for kind in kinds)]
    canvas.legend(marks, names, loc="outside lower center", ncols=len(names), frameon=False)
    save(canvas, path)


def _layer(module: str) -> str:
    return next((part for part in module.split(".") if part.isdigit()), module)


def _in_order(place: str) -> tuple[str | int, ...]:
    """Numbers as numbers: layer 2 before layer 10."""
    return tuple(int(part) if part.isdigit() else part for part in place.split("."))


def _name_places(axes: Axes, along: str, places: Sequence[str]) -> None:
    every = max(1, len(places) // 10)
    if along != "module":
        axes.set_xticks(range(0, len(places), every), places[::every])
        axes.set_xlabel(along)
        return
    names = [f"{_layer(place)} {place.split('.')[-1][0]}" for place in places]
    axes.set_xticks(range(0, len(places), every), names[::every], fontsize=8)
    axes.set_xlabel("layer and projection (q or v)")
