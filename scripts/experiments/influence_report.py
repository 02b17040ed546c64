"""Tables and the figure of `influence.py`, from its csv files alone."""
# SPDX-License-Identifier: Apache-2.0

import csv
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from scripts.experiments.tables import COLOURS

Row = dict[str, str]
HELD_OUT = 20  # seeds from here on were run once, with the final rule
TOLD = ("oracle",)


def read(place: Path) -> list[Row]:
    with open(place, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def distinct(rows: Iterable[Row], name: str) -> list[str]:
    return list(dict.fromkeys(row[name] for row in rows))


def spread(rows: Iterable[Row], name: str) -> str:
    """Mean and standard deviation over seeds; empty without a number."""
    values = [float(row[name]) for row in rows if row[name]]
    if not values:
        return ""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def table(rows: Sequence[Row], name: str) -> list[str]:
    """Markdown: a row an attack, a column a rule."""
    rules = distinct(rows, "rule")
    lines = ["| attack | contaminated | " + " | ".join(rules) + " |", "|" + "---|" * (2 + len(rules))]
    for attack, count in dict.fromkeys((row["attack"], row["contaminated"]) for row in rows):
        own = [row for row in rows if (row["attack"], row["contaminated"]) == (attack, count)]
        texts = [spread((row for row in own if row["rule"] == rule), name) for rule in rules]
        lines.append(f"| {attack} | {count} of 12 | " + " | ".join(texts) + " |")
    return lines


def found(rows: Sequence[Row]) -> list[str]:
    """Markdown: whom clair flags and names, and what it leaves of the attackers' influence."""
    head = "| attack | contaminated | flagged | named near the line | influence kept | benign flagged |"
    lines = [head, "|" + "---|" * 6]
    own = [row for row in rows if row["rule"] == "clair"]
    for attack, count in dict.fromkeys((row["attack"], row["contaminated"]) for row in own):
        cell = [row for row in own if (row["attack"], row["contaminated"]) == (attack, count)]
        all_of = int(count) * len(cell)
        totals = [sum(int(row[name]) for row in cell) for name in ("found", "suspicious", "wrongly flagged")]
        kept = spread(cell, "kept")
        lines.append(f"| {attack} | {count} | {totals[0]} of {all_of} | {totals[1]} | {kept} | {totals[2]} |")
    return lines


def over_rounds(rows: Sequence[Row]) -> list[str]:
    """Markdown: loss after each round."""
    numbers = distinct(rows, "round")
    lines = ["| attack | rule | " + " | ".join(f"round {n}" for n in numbers) + " |", "|" + "---|" * (2 + len(numbers))]
    for attack, rule in dict.fromkeys((row["attack"], row["rule"]) for row in rows):
        own = [row for row in rows if (row["attack"], row["rule"]) == (attack, rule)]
        texts = [spread((row for row in own if row["round"] == n), "loss") for n in numbers]
        lines.append(f"| {attack} | {rule} | " + " | ".join(texts) + " |")
    return lines


def drawn(rows: Sequence[Row]) -> Figure:
    """Loss by attack: a mark a rule, the mean over seeds; a thin line from the smallest seed to the largest."""
    cells = list(dict.fromkeys((row["attack"], row["contaminated"]) for row in rows))
    rules = distinct(rows, "rule")
    figure = Figure(figsize=(8.5, 0.42 * len(cells) + 1.6), layout="constrained")
    axes = figure.add_subplot()
    for number, rule in enumerate(rules):
        places, means = [], []
        for place, (attack, count) in enumerate(cells):
            cell = [r for r in rows if (r["attack"], r["contaminated"], r["rule"]) == (attack, count, rule)]
            losses = [float(row["loss"]) for row in cell]
            if losses:
                y = place + (number - len(rules) / 2) * 0.09
                places.append(y)
                means.append(statistics.mean(losses))
                axes.plot([min(losses), max(losses)], [y, y], color=COLOURS[number % len(COLOURS)], lw=0.8, alpha=0.6)
        marker = "|" if rule in TOLD else "os^Dv<>P"[number % 8]
        axes.plot(means, places, marker, color=COLOURS[number % len(COLOURS)], markersize=5, label=rule)
    axes.set_yticks(range(len(cells)), [f"{attack}, {count} of 12" for attack, count in cells])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xticks([0.6, 1, 2, 4, 7], ["0.6", "1", "2", "4", "7"])
    axes.minorticks_off()
    axes.set_xlabel("loss of the honest clients under the global adapter, nats per letter (log scale)")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return figure


def write_report(folder: Path) -> None:
    """tables.md and loss.png beside the csv files they are made from."""
    rows = read(folder / "attacks.csv")
    parts = ["# Influence: the tables", "", "Written by `influence.py --report`.", ""]
    groups = [("chosen before", [r for r in rows if int(r["seed"]) < HELD_OUT])]
    groups += [("held out", [r for r in rows if int(r["seed"]) >= HELD_OUT])]
    for name, own in groups:
        if not own:
            continue
        seeds = ", ".join(distinct(own, "seed"))
        parts += [f"## Loss, seeds {name} ({seeds})", "", *table(own, "loss"), ""]
        parts += [f"## Damage, seeds {name} ({seeds})", "", *table(own, "damage"), ""]
    parts += ["## What landed of the backdoor, in typical norms of a client, all seeds", ""]
    parts += [*table([r for r in rows if r["attack"].startswith("backdoor")], "landed"), ""]
    parts += ["## Whom clair flags and names, all seeds", "", *found(rows), ""]
    if (folder / "rounds.csv").exists():
        parts += ["## Loss over rounds, all seeds", "", *over_rounds(read(folder / "rounds.csv")), ""]
    (folder / "tables.md").write_text("\n".join(parts), encoding="utf-8")
    drawn(rows).savefig(folder / "loss.png", dpi=150)
