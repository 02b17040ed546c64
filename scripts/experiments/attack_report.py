"""The attack table as files: attacks.csv (every cell and seed), tables.md (means over seeds), two figures."""
# SPDX-License-Identifier: Apache-2.0

import csv
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from scripts.experiments.attack_figures import WORST, draw_global, draw_personal

Row = dict[str, str | int | float]
DETECTORS = ("clair hard", "multikrum", "flower Krum", "flower MultiKrum", "flower Bulyan")
REFINED = ("clair hard", "clair soft")


class Table:
    """Rows of the experiment, asked for by their keys."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.regimes, self.rules = _distinct(rows, "regime"), _distinct(rows, "rule")
        # The rules that make a global adapter, which does not depend on how CLAIR refines; with their titles.
        self.combining = {r: r.replace("clair hard", "clair") for r in self.rules if r not in ("local", "clair soft")}
        self.cells = list(dict.fromkeys((str(row["attack"]), int(row["contaminated"])) for row in rows))
        self.counts = sorted({count for _, count in self.cells})
        self.clients = int(rows[0]["clients"])
        self._values: dict[tuple[object, ...], list[Row]] = {}
        for row in rows:
            key = (row["regime"], row["attack"], int(row["contaminated"]), row["rule"])
            self._values.setdefault(key, []).append(row)

    def values(self, regime: str, cell: tuple[str, int], rule: str, column: str) -> list[float]:
        """One number a seed; empty where the rule has nothing in this column."""
        return [float(row[column]) for row in self._values.get((regime, *cell, rule), ()) if row[column] != ""]

    def mean(self, regime: str, cell: tuple[str, int], rule: str, column: str) -> float:
        return statistics.fmean(self.values(regime, cell, rule, column) or [float("nan")])

    def at(self, count: int) -> list[tuple[str, int]]:
        """The clean cell, and every attack by `count` clients."""
        return [cell for cell in self.cells if cell[1] in (0, count)]


def write_report(folder: Path, rows: Sequence[Row]) -> None:
    with open(folder / "attacks.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    table = Table(rows)
    parts = ["# Attack table\n\nMeans over seeds ± standard deviation between them; written by `attacks.py`.\n"]
    for regime in table.regimes:
        parts += [f"## {regime}\n", "### Never worse than alone, never worse than FedAvg?\n", goal(table, regime)]
        parts += ["### Detection: precision / recall, benign clients left out\n", detection(table, regime)]
        parts += ["### Benign clients' loss, personal adapters\n", personal(table, regime, "loss")]
        parts += ["### Benign clients' accuracy, personal adapters\n", personal(table, regime, "accuracy")]
        for count in table.counts[1:]:
            title = f"### Benign clients' loss, global adapter, {count} of {table.clients} contaminated\n"
            parts += [title, global_losses(table, regime, count)]
    (folder / "tables.md").write_text("\n".join(parts), encoding="utf-8")
    draw_global(table, folder / "global.png")
    draw_personal(table, folder / "personal.png")


def grid(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join(["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *body, ""])


def spread(values: Sequence[float]) -> str:
    """mean ± standard deviation between seeds."""
    if not values:
        return "-"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{_number(statistics.fmean(values))} ± {_number(deviation)}"


def _number(value: float) -> str:
    return f"{value:.3f}" if value < WORST else f"{value:.0f}"


def _named(cell: tuple[str, int], clients: int) -> str:
    return f"{cell[0]}, {cell[1]}/{clients}" if cell[1] else "none contaminated"


def detection(table: Table, regime: str) -> str:
    rules = [rule for rule in DETECTORS if rule in table.rules]

    def entry(cell: tuple[str, int], rule: str) -> str:
        found = {c: table.values(regime, cell, rule, c) for c in ("precision", "recall", "false_positives")}
        shares = [f"{statistics.fmean(found[c]):.2f}" if found[c] else "-" for c in ("precision", "recall")]
        return f"{shares[0]} / {shares[1]}, {statistics.fmean(found['false_positives'] or [0]):.1f}"

    lines = [[_named(cell, table.clients), *(entry(cell, rule) for rule in rules)] for cell in table.cells]
    return grid(["", *(table.combining[rule] for rule in rules)], lines)


def personal(table: Table, regime: str, metric: str) -> str:
    """Alone, FedAvg's one adapter, the refined ones, and those that clients chose on their validation lines."""
    columns: dict[str, tuple[str, str]] = {"alone": ("local", "personal"), "FedAvg": ("fedavg", "global")}
    columns |= {"FedAvg of the benign": ("fedavg of the benign", "global"), "CLAIR global": ("clair hard", "global")}
    columns |= {rule.replace("clair", "CLAIR"): (rule, "personal") for rule in REFINED}
    choosing = ("fedavg", "multikrum", *REFINED)
    columns |= {f"chosen: {rule}": (rule, "chosen") for rule in choosing if rule in table.rules}
    lines = []
    for cell in table.cells:
        values = [spread(table.values(regime, cell, rule, f"{kind}_{metric}")) for rule, kind in columns.values()]
        lines.append([_named(cell, table.clients), *values])
    return grid(["", *columns], lines)


def global_losses(table: Table, regime: str, count: int) -> str:
    cells = table.at(count)
    lines = [
        [title, *(spread(table.values(regime, cell, rule, "global_loss")) for cell in cells)]
        for rule, title in table.combining.items()
    ]
    return grid(["", *(cell[0] for cell in cells)], lines)


def goal(table: Table, regime: str) -> str:
    """In how many cells the mean loss is at most that of the better of alone and FedAvg, and the largest excess."""
    ways: dict[str, tuple[str, str]] = {"CLAIR global": ("clair hard", "global")}
    ways |= {f"CLAIR {rule[6:]}, as given": (rule, "personal") for rule in REFINED}
    ways |= {f"CLAIR {rule[6:]}, chosen": (rule, "chosen") for rule in REFINED}
    ways |= {f"{rule}, chosen": (rule, "chosen") for rule in ("fedavg", "multikrum")}
    lines = []
    for title, (rule, kind) in ways.items():
        if rule not in table.rules:
            continue
        column = f"{kind}_loss"
        over_means = _excesses(table, regime, rule, column, lambda values: [statistics.fmean(values)])
        over_runs = _excesses(table, regime, rule, column, lambda values: values)
        worst = max(over_means, default=float("nan"))
        lines.append([title, _share(over_means), _share(over_runs), f"{worst:+.4f}"])
    return grid(["", "cells (means over seeds)", "single runs", "largest excess of a cell, nats"], lines)


def _excesses(
    table: Table, regime: str, rule: str, column: str, reduce: Callable[[list[float]], list[float]]
) -> list[float]:
    """Loss above that of the better of alone and FedAvg, of every cell (or of every run in it)."""
    found = []
    for cell in table.cells:
        mine = reduce(table.values(regime, cell, rule, column))
        alone = reduce(table.values(regime, cell, "local", "personal_loss"))
        fedavg = reduce(table.values(regime, cell, "fedavg", "global_loss"))
        found += [m - min(a, f) for m, a, f in zip(mine, alone, fedavg, strict=True)]
    return found


def _share(excesses: Sequence[float]) -> str:
    return f"{sum(excess <= 0 for excess in excesses)} of {len(excesses)}"


def _distinct(rows: Sequence[Row], column: str) -> list[str]:
    return list(dict.fromkeys(str(row[column]) for row in rows))
