"""Write the tables that are made from code or measurements into README.md and docs/choosing.md, between their markers.

python scripts/update_readme.py
"""
# SPDX-License-Identifier: Apache-2.0

import csv
import statistics
from collections.abc import Iterable
from pathlib import Path

from fedlora_hf.methods import METHODS
from fedlora_hf.methods.method import Method

PROJECT = Path(__file__).resolve().parents[1]
README, CHOOSING = PROJECT / "README.md", PROJECT / "docs" / "choosing.md"
ATTACKS = PROJECT / "docs" / "results" / "attacks" / "attacks.csv"
INSTRUCTIONS = PROJECT / "docs" / "results" / "methods" / "methods.csv"
# Columns of the table of losses: what four of the twelve clients do.
COLUMNS = {
    "nobody is contaminated": ("none",),
    "wrong answers": ("random targets", "permuted labels", "colluding permutation"),
    "sign flip": ("sign flip",),
    "boosted, noise, zero": ("boost x10", "flip and boost", "gaussian", "zero"),
    "a little is enough": ("a little is enough",),
    "copies": ("copy of another",),
}
RULES = {
    "`fedavg`": "fedavg",
    "`product_mean`": "product_mean",
    "`median`": "median",
    "`trimmed_mean`": "trimmed_mean",
    "`geometric_median`": "geometric_median",
    "`multikrum`": "multikrum",
    "`clair`": "clair hard",
}


def methods() -> str:
    """The methods as Markdown, in the registry's order."""
    rows = ["| `--aggregation` | what it does | averages | robust | source |", "|---|---|---|---|---|"]
    rows += [_row(method) for method in METHODS.values()]
    return "\n".join(rows)


def _row(method: Method) -> str:
    robust = "yes" if method.robust else ""
    return f"| `{method.name}` | {method.title} | {method.averages} | {robust} | {method.paper} |"


def losses(column: str, rules: dict[str, str], regime: str = "scarce") -> str:
    """Benign clients' loss in the attack table as Markdown: means over seeds and attacks, the best of a column bold."""
    with open(ATTACKS, newline="", encoding="utf-8") as file:
        found = [row for row in csv.DictReader(file) if row["regime"] == regime and row[column]]
    cells = [[_mean(found, column, rule, attacks) for attacks in COLUMNS.values()] for rule in rules.values()]
    best = [min(values) for values in zip(*cells, strict=True)]
    rows = ["| | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for title, values in zip(rules, cells, strict=True):
        shown = (f"**{v:.2f}**" if v == low else f"{v:.2f}" for v, low in zip(values, best, strict=True))
        rows.append(f"| {title} | " + " | ".join(shown) + " |")
    return "\n".join(rows)


def _mean(rows: Iterable[dict[str, str]], column: str, rule: str, attacks: tuple[str, ...]) -> float:
    count = "0" if attacks == ("none",) else "4"
    values = (r[column] for r in rows if r["rule"] == rule and r["attack"] in attacks and r["contaminated"] == count)
    return statistics.mean(map(float, values))


def instructions() -> str:
    """Benign clients' loss on real instructions as Markdown: means over the seeds that have every attack, the best of a
    column bold, and the worst cell of each method."""
    with open(INSTRUCTIONS, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    found = {(row["rule"], row["attack"], row["seed"]): float(row["loss"]) for row in rows}
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    every = [(rule, attack) for rule in rules for attack in attacks]
    seeds = [s for s in sorted({row["seed"] for row in rows}) if all((*cell, s) in found for cell in every)]
    means = {rule: [statistics.mean(found[rule, attack, s] for s in seeds) for attack in attacks] for rule in rules}
    best = [min(values) for values in zip(*means.values(), strict=True)]
    lines = [f"| {len(seeds)} seeds | " + " | ".join(attacks) + " | worst |", "|---|" + "---|" * (len(attacks) + 1)]
    for rule, values in means.items():
        text = [f"{value:.2f}" for value in values]
        shown = (f"**{t}**" if t == f"{low:.2f}" else t for t, low in zip(text, best, strict=True))
        lines.append(f"| {rule} | " + " | ".join(shown) + f" | {max(values):.2f} |")
    return "\n".join(lines)


def with_table(text: str, name: str, table: str) -> str:
    """The text with `table` between the markers of that name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def updated() -> dict[Path, str]:
    """{file: its text as it should be}."""
    choosing = CHOOSING.read_text(encoding="utf-8")
    choosing = with_table(choosing, "global", losses("global_loss", RULES))
    chosen = {name: rule for name, rule in RULES.items() if name in ("`fedavg`", "`multikrum`", "`clair`")}
    choosing = with_table(choosing, "chosen", losses("chosen_loss", chosen))
    choosing = with_table(choosing, "instructions", instructions())
    return {README: with_table(README.read_text(encoding="utf-8"), "methods", methods()), CHOOSING: choosing}


if __name__ == "__main__":
    for path, text in updated().items():
        path.write_text(text, encoding="utf-8")
