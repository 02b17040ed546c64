"""The sensitivity study as files: deltas.csv, ratios.csv, tables.md and three figures."""
# SPDX-License-Identifier: Apache-2.0

import itertools
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullFormatter

from scripts.common import markdown, write_csv
from scripts.experiments.tables import COLOURS

Row = dict[str, str | int | float]
# {ratio: (numerator, denominator, delta, the published number)}; published for LLaMA2-7B on tasks of Dolly.
RATIOS = {
    "direction A / B": ("A", "B", "direction", 1.7),
    "magnitude B / A": ("B", "A", "magnitude", 41.0),
    "relative magnitude B / A": ("B", "A", "relative", 41.0),
}
DELTAS = ("direction", "magnitude", "relative")
KEYS = ("data", "start", "between", "axis")


def write_report(folder: Path, rows: Sequence[Row], environment: str) -> None:
    found = list(ratios(rows))
    write_csv(folder / "ratios.csv", found)
    parts = ["# Sensitivity of magnitudes and directions", f"Written by `sensitivity.py`. {environment}.", "## Ratios"]
    parts += [_REMARK, markdown(ratio_table(found))]
    start = str(rows[0]["start"])
    for data in dict.fromkeys(str(row["data"]) for row in rows):
        parts += [f"## Layers: {data}, between clients, start: {start}", markdown(layer_table(rows, data, start))]
    (folder / "tables.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    draw_ratios(found, folder / "ratios.png")
    draw_layers(rows, folder / "layers.png")
    draw_steps(rows, folder / "steps.png")


_REMARK = (
    "At the last snapshot; means over seeds of the ratio of the means over modules (smallest to largest seed), and in "
    "brackets the share of modules and seeds in which the ratio is above 1."
)


def ratios(rows: Sequence[Row]) -> Iterator[Row]:
    """One row for each (data, start, comparison, axis, seed): the ratios at the last snapshot, the deltas behind them,
    and the share of modules in which each ratio is above 1."""
    last = max(int(row["step"]) for row in rows)
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if int(row["step"]) == last:
            groups.setdefault(tuple(str(row[name]) for name in (*KEYS, "seed")), []).append(row)
    for key, group in groups.items():
        mean = {
            f: {d: statistics.fmean(float(row[d]) for row in group if row["factor"] == f) for d in DELTAS} for f in "AB"
        }
        found: Row = dict(zip((*KEYS, "seed"), key, strict=True))
        for name, (top, bottom, delta, _) in RATIOS.items():
            found[name] = _short(_ratio(mean[top][delta], mean[bottom][delta]))
            found[f"{name}, modules above 1"] = _short(_share_above(group, top, bottom, delta))
        yield found | {f"{delta} {factor}": _short(mean[factor][delta]) for delta in DELTAS for factor in "AB"}


def _share_above(group: Sequence[Row], top: str, bottom: str, delta: str) -> float:
    by = {(str(row["module"]), str(row["factor"])): float(row[delta]) for row in group}
    return statistics.fmean(by[module, top] > by[module, bottom] for module, factor in by if factor == top)


def _ratio(top: float, bottom: float) -> float:
    return top / bottom if bottom else float("nan")


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def ratio_table(found: Sequence[Row]) -> list[Row]:
    """One line for each (data, start, comparison, axis), the published numbers first."""
    lines: list[Row] = [dict.fromkeys(KEYS, "") | {name: f"{entry[3]:g}" for name, entry in RATIOS.items()}]
    lines[0]["data"] = "published"
    for key, group in _grouped(found, KEYS):
        line: Row = dict(zip(KEYS, key, strict=True))
        for name in RATIOS:
            values = [float(row[name]) for row in group]
            above = statistics.fmean(float(row[f"{name}, modules above 1"]) for row in group)
            line[name] = f"{statistics.fmean(values):.3g} ({min(values):.3g}–{max(values):.3g}) [{above:.0%}]"
        lines.append(line)
    return lines


def layer_table(rows: Sequence[Row], data: str, start: str) -> list[Row]:
    """Means over seeds, one line a module, rows as axis."""
    chosen = _chosen(rows, data=data, between="clients", axis="row", start=start, step=_last(rows))
    lines = []
    for (module,), group in _grouped(chosen, ("module",)):
        line: Row = {"module": module}
        for delta, factor in itertools.product(DELTAS, "AB"):
            values = [float(row[delta]) for row in group if row["factor"] == factor]
            line[f"{delta}, {factor}"] = f"{statistics.fmean(values):.4f}"
        lines.append(line)
    return lines


def _chosen(rows: Sequence[Row], **wanted: str | int) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def _last(rows: Sequence[Row]) -> int:
    return max(int(row["step"]) for row in rows)


def _grouped(rows: Sequence[Row], keys: Sequence[str]) -> list[tuple[tuple[str, ...], list[Row]]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row[key]) for key in keys), []).append(row)
    return list(groups.items())


def draw_ratios(found: Sequence[Row], path: Path) -> None:
    """One panel a ratio; a dot a seed, a bar their mean; dashed: 1; solid: the published number. Rows as axis."""
    groups = _grouped([row for row in found if row["axis"] == "row"], ("data", "between", "start"))
    figure, panels = plt.subplots(1, 3, figsize=(12, 1.6 + 0.26 * len(groups)), sharey=True, layout="constrained")
    datasets = list(dict.fromkeys(key[0] for key, _ in groups))
    for axes, (name, (_, _, _, published)) in zip(panels, RATIOS.items(), strict=True):
        for y, (key, group) in enumerate(groups):
            values, colour = [float(row[name]) for row in group], COLOURS[datasets.index(key[0])]
            axes.scatter(values, [y] * len(values), s=16, color=colour, alpha=0.7)
            axes.scatter([statistics.fmean(values)], [y], marker="|", s=160, color=colour)
        axes.axvline(1, color="#666666", ls="--", lw=1)
        axes.axvline(published, color="#000000", lw=1)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator([0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"{name} (published: {published:g})", fontsize=10)
        axes.grid(axis="x", alpha=0.25)
    names = [f"{data}, between {between}, {start}" for (data, between, start), _ in groups]
    panels[0].set_yticks(range(len(groups)), names, fontsize=8)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_layers(rows: Sequence[Row], path: Path) -> None:
    """Between clients from the first kind of start, layer by layer: one line a factor, a band over the seeds."""
    chosen = _chosen(rows, between="clients", axis="row", start=str(rows[0]["start"]), step=_last(rows))
    groups = _grouped(chosen, ("data",))
    figure, panels = plt.subplots(
        len(groups), 3, figsize=(12, 0.8 + 2.3 * len(groups)), sharex=True, squeeze=False, layout="constrained"
    )
    for line, ((data,), group) in zip(panels, groups, strict=True):
        for axes, delta in zip(line, DELTAS, strict=True):
            modules = _lines(axes, group, delta, "module")
            axes.set_xticks(range(len(modules)), [_short_name(module) for module in modules], rotation=60, fontsize=7)
            axes.set_title(f"{data}: {_title(delta)}", fontsize=9)
    panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_steps(rows: Sequence[Row], path: Path) -> None:
    """Each client against its own first snapshot, over training; from a fresh adapter and from a federated one."""
    chosen = [row for row in _chosen(rows, between="steps", axis="row") if row["start"] != "fresh, own"]
    groups = _grouped(chosen, ("data", "start"))
    figure, panels = plt.subplots(
        len(groups), 3, figsize=(12, 0.8 + 1.9 * len(groups)), sharex=True, squeeze=False, layout="constrained"
    )
    for line, ((data, start), group) in zip(panels, groups, strict=True):
        for axes, delta in zip(line, DELTAS, strict=True):
            steps = _lines(axes, group, delta, "step")
            axes.set_xticks(range(len(steps)), steps)
            axes.set_title(f"{data}, {start}: {_title(delta)}", fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("step")
    panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _lines(axes: Axes, rows: Sequence[Row], delta: str, along: str) -> list[str]:
    """Draw A and B along a key, means over everything else, and the seeds' range; the values of the key."""
    places = [key for (key,), _ in _grouped(rows, (along,))]
    for factor, colour, marker in (("A", COLOURS[0], "o"), ("B", COLOURS[1], "s")):
        own = [row for row in rows if row["factor"] == factor]
        each = [
            [statistics.fmean(float(row[delta]) for row in group) for _, group in _grouped(at, ("seed",))]
            for at in ([row for row in own if str(row[along]) == place] for place in places)
        ]
        axes.plot(range(len(places)), [statistics.fmean(v) for v in each], marker=marker, color=colour, label=factor)
        low, high = [min(values) for values in each], [max(values) for values in each]
        axes.fill_between(range(len(places)), low, high, color=colour, alpha=0.2, lw=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    return places


def _title(delta: str) -> str:
    return {"direction": "1 - cos", "magnitude": "change of magnitude", "relative": "the same, relative"}[delta]


def _short_name(module: str) -> str:
    parts = module.split(".")
    layer = next((part for part in parts if part.isdigit()), "")
    return f"{layer} {parts[-1]}".strip()
