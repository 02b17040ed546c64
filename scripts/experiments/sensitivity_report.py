"""The sensitivity study as files beside deltas.csv: ratios.csv, tables.md and three figures."""
# SPDX-License-Identifier: Apache-2.0

import itertools
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from scripts.common import markdown, write_csv
from scripts.experiments.sensitivity_figures import draw_layers, draw_ratios, draw_steps

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
    draw_ratios(found, {name: entry[3] for name, entry in RATIOS.items()}, folder / "ratios.png")
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
