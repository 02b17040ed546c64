"""The page of the experiments on real bases, from methods.csv, attacks.csv and protocol.csv.

tables.md and three figures are made anew; in README.md the two tables between marks are.

    python -m scripts.experiments.real_report                 # of docs/results/real
    python -m scripts.experiments.real_report --take OUT GPU  # after adding the cells found in these folders

Intervals are 95 % bootstrap intervals over (seed, client) pairs, paired with
product_mean's, the exact mean (with FedAvg's where that has more seeds); spreads are over seeds.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora_hf.numerics.intervals import bootstrap
from scripts import PROJECT
from scripts.common import markdown
from scripts.experiments import real_attacks, real_methods, real_protocol
from scripts.experiments.real_cells import Table
from scripts.experiments.real_figures import draw_attacks, draw_methods, draw_protocol
from scripts.experiments.real_methods import KINDS

Row = Mapping[str, Any]
KEYS = {"methods": real_methods.KEY, "attacks": real_attacks.KEY, "protocol": real_protocol.KEY}
# {column: (what a positive gain means, factor)}.
GAINS = {
    "loss": ("% of the loss", -100.0),
    "token_accuracy": ("points of token accuracy", 100.0),
    "exact_match": ("points of exact match", 100.0),
    "rouge_l": ("points of ROUGE-L", 100.0),
}
# What gains are gains over: the one with the most seeds, the first of them where both have as many.
REFERENCES = ("product_mean", "fedavg")
# Whose loss is shown of a rule: of its global adapter, or of what it leaves each client.
SHOWN = {"local": ("personal",), "clair": ("global", "personal"), real_attacks.JUDGED: ("global", "personal")}


def reported(rows: Iterable[Row], base: str, data: str) -> list[Row]:
    """The rows of one base and source that are not for tuning."""
    return [r for r in rows if r["base"] == base and r["data"] == data and not int(r["tuning"])]


def reference_of(rows: Sequence[Row]) -> str:
    """The method that the others are held against."""
    return max(REFERENCES, key=lambda method: len({row["seed"] for row in rows if row["method"] == method}))


def gains(rows: Sequence[Row], method: str, kind: str, metric: str) -> dict[str, list[float]]:
    """{seed: gain over the reference of the same seed and client, client by client}; positive is better."""
    column, factor = f"{kind}_{metric}", GAINS[metric][1]
    held = reference_of(rows)
    reference = {(r["seed"], r["client"]): r[column] for r in rows if r["method"] == held and r[column] != ""}
    pairs = [(r, reference.get((r["seed"], r["client"]), "")) for r in rows if r["method"] == method]
    pairs = [(r, then) for r, then in pairs if then != "" and r[column] != ""]
    scale = statistics.fmean(float(then) for _, then in pairs) if pairs and metric == "loss" else 1.0
    found: dict[str, list[float]] = {}
    for row, then in pairs:
        found.setdefault(row["seed"], []).append(factor * (float(row[column]) - float(then)) / scale)
    return found


def summary(found: Mapping[str, Sequence[float]]) -> tuple[float, float, float, int, int]:
    """(mean, low, high, seeds in which the mean is above 0, seeds)."""
    values = [value for own in found.values() for value in own]
    low, high = bootstrap(values, seed=0)
    means = [statistics.fmean(own) for own in found.values()]
    return statistics.fmean(values), low, high, sum(mean > 0 for mean in means), len(means)


def told(found: Mapping[str, Sequence[float]]) -> str:
    """mean [low, high], seeds better of all; a dash without numbers."""
    if not found:
        return "-"
    mean, low, high, better, seeds = summary(found)
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}] {better}/{seeds}"


def methods_table(rows: Sequence[Row], kind: str) -> str:
    """One line a method: absolute loss (spread over seeds), and gains over the reference with intervals."""
    lines, reference = [], reference_of(rows)
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method and row[f"{kind}_loss"] != ""]
        if not own:  # clients alone have no global adapter
            continue
        by_seed: dict[str, list[float]] = {}
        for row in own:
            by_seed.setdefault(row["seed"], []).append(float(row[f"{kind}_loss"]))
        means = [statistics.fmean(losses) for losses in by_seed.values()]
        spread = statistics.stdev(means) if len(means) > 1 else 0.0
        rates = ", ".join(sorted({f"{float(row['rate']):g}" for row in own}))
        line: dict[str, object] = {"method": method, "rate": "-" if method == "base" else rates}
        line["seeds"] = len(means)
        line["loss"] = f"{statistics.fmean(means):.3f} ± {spread:.3f}"
        for metric, (unit, _) in GAINS.items():
            found = gains(rows, method, kind, metric)
            line[f"over {reference}, {unit}"] = "" if method == reference else told(found)
        lines.append(line)
    return markdown(lines)


def methods_overview(rows: Sequence[Row]) -> str:
    """One line a method, two columns a base and source: the gain in loss over the reference, % with its interval."""
    groups = list(dict.fromkeys((r["base"], r["data"]) for r in rows if not int(r["tuning"])))
    methods = dict.fromkeys(r["method"] for r in rows if not int(r["tuning"]))
    held = {group: reference_of(reported(rows, *group)) for group in groups}
    lines = []
    for method in methods:
        line: dict[str, object] = {"method": method}
        for base, data in groups:
            own = reported(rows, base, data)
            seeds = len({r["seed"] for r in own if r["method"] == held[base, data]})
            for kind in KINDS:
                found = gains(own, method, kind, "loss")
                column = f"{base}, {data} ({seeds}): {'personal' if kind == 'local' else kind}"
                line[column] = f"over `{held[base, data]}`" if method == held[base, data] else _interval(found)
        lines.append(line)
    return markdown(lines)


def _interval(found: Mapping[str, Sequence[float]]) -> str:
    if not found:
        return "-"
    mean, low, high = summary(found)[:3]
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def attacks_overview(rows: Sequence[Row]) -> str:
    """One line a base, kind of clients and attack: the honest clients' loss, and how many of the contaminated are found
    and of the honest left out."""
    lines = []
    for base, split in dict.fromkeys((row["base"], row["split"]) for row in rows):
        own = [row for row in rows if (row["base"], row["split"]) == (base, split)]
        for attack in dict.fromkeys(row["attack"] for row in own):
            mine = [row for row in own if row["attack"] == attack]
            seeds = len({row["seed"] for row in mine})
            line: dict[str, object] = {"base, clients (seeds)": f"{base}, {split} ({seeds})", "attack": attack}
            for rule in real_attacks.RULES:
                kind = "personal" if rule == "local" else "global"
                losses = [float(row[f"{kind}_loss"]) for row in mine if row["rule"] == rule]
                line["alone" if rule == "local" else rule] = f"{statistics.fmean(losses):.2f}"
            for rule in ("multikrum", "clair", real_attacks.JUDGED):
                line[f"{rule}: found, honest out"] = _found([row for row in mine if row["rule"] == rule])
            lines.append(line)
    return markdown(lines)


def _found(rows: Sequence[Row]) -> str:
    """How many of the contaminated were found, and how many honest clients were left out."""
    bad = sum(int(row["contaminated"]) for row in rows)
    found, wrong = (sum(int(row[name]) for row in rows) for name in ("found", "wrongly_out"))
    # Where nobody is contaminated, those who would be are honest too.
    return f"{found} of {bad}, {wrong}" if bad else f"-, {found + wrong}"


def put_between(page: str, name: str, table: str) -> str:
    """The page with the table between its two marks of that name; as it is without them."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if begin not in page or end not in page:
        return page
    return f"{page.partition(begin)[0]}{begin}\n{table}\n{end}{page.partition(end)[2]}"


def whole(rows: Sequence[Row]) -> list[Row]:
    """The rows of the attack table's seeds that have every attack: losses of different seeds are not comparable."""
    attacks: dict[tuple[str, ...], set[str]] = {}
    for row in rows:
        attacks.setdefault((row["base"], row["split"], row["seed"]), set()).add(row["attack"])
    most = {key[:2]: max(len(v) for k, v in attacks.items() if k[:2] == key[:2]) for key in attacks}
    return [r for r in rows if len(attacks[r["base"], r["split"], r["seed"]]) == most[r["base"], r["split"]]]


def tuning_table(rows: Sequence[Row]) -> str:
    """One line a method, a column a rate: validation loss of the global and of the personal adapters, tuning seeds."""
    rates = sorted({float(row["rate"]) for row in rows})
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        line: dict[str, object] = {"method": method}
        for rate in rates:
            own = [row for row in rows if row["method"] == method and float(row["rate"]) == rate]
            means = [statistics.fmean(float(r[f"{kind}_validation_loss"]) for r in own) for kind in KINDS if own]
            line[f"{rate:g}"] = ", ".join(f"{mean:.3f}" for mean in means)
        lines.append(line)
    return markdown(lines)


def attacks_table(rows: Sequence[Row]) -> str:
    """One line an attack: honest clients' loss under each rule, who was found and who was wrongly left out."""
    lines = []
    for attack in dict.fromkeys(row["attack"] for row in rows):
        own = [row for row in rows if row["attack"] == attack]
        line: dict[str, object] = {"attack": attack, "seeds": len({row["seed"] for row in own})}
        for rule in dict.fromkeys(row["rule"] for row in own):
            mine = [row for row in own if row["rule"] == rule]
            for kind in SHOWN.get(rule, ("global",)):
                values = [float(row[f"{kind}_loss"]) for row in mine]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                line[f"{rule}, {kind}"] = f"{statistics.fmean(values):.3f} ± {spread:.3f}"
        for rule in ("multikrum", "clair", real_attacks.JUDGED):
            line[f"{rule}: found, wrongly out"] = _found([row for row in own if row["rule"] == rule])
        for rule in ("clair", real_attacks.JUDGED):
            mine = [row for row in own if row["rule"] == rule and int(row["contaminated"])]
            kept = statistics.fmean(float(row["weight_of_bad"]) for row in mine) if mine else None
            line[f"{rule}: weight of the contaminated"] = "-" if kept is None else f"{kept:.3f}"
        lines.append(line)
    return markdown(lines)


def protocol_table(rows: Sequence[Row]) -> str:
    """One line a strategy and first rate: loss at the start and the end, and what was sent."""
    lines = []
    for peak, strategy in dict.fromkeys((row["peak"], row["strategy"]) for row in rows):
        own = [row for row in rows if (row["peak"], row["strategy"]) == (peak, strategy)]
        last = max(int(row["round"]) for row in own)
        first = [float(row["loss"]) for row in own if int(row["round"]) == 0]
        final = [row for row in own if int(row["round"]) == last]
        losses, sent = [float(row["loss"]) for row in final], float(final[0]["megabytes"])
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        lines.append({"first rate": peak, "strategy": strategy, "seeds": len(losses), "rounds": last, "MB sent": sent}
                     | {"loss before": f"{statistics.fmean(first):.4f}"}
                     | {"after": f"{statistics.fmean(losses):.4f}{spread}"})  # fmt: skip
    return markdown(lines)


def parts(tables: Mapping[str, Table]) -> list[str]:
    found = [
        "# Real bases: the tables",
        "Written by `real_report.py`; [the page](README.md) says what is in them.",
    ]
    rows = tables["methods"].rows
    for base, data in dict.fromkeys((row["base"], row["data"]) for row in rows):
        own = reported(rows, base, data)
        for kind in KINDS if own else ():
            title = "personal" if kind == "local" else kind
            found += [f"## {base}, {data}: {title} adapters", methods_table(own, kind)]
        tuned = [r for r in rows if r["base"] == base and r["data"] == data and int(r["tuning"])]
        if tuned:
            title = f"### {base}, {data}: validation loss on the tuning seeds, global and personal, by learning rate"
            found += [title, tuning_table(tuned)]
    rows = whole(tables["attacks"].rows)
    for base, split in dict.fromkeys((row["base"], row["split"]) for row in rows):
        own = [row for row in rows if (row["base"], row["split"]) == (base, split)]
        found += [f"## {base}: attacks, {split} clients", attacks_table(own)]
    rows = tables["protocol"].rows
    for base in dict.fromkeys(row["base"] for row in rows):
        found += [f"## {base}: FlowerTune's setting", protocol_table([row for row in rows if row["base"] == base])]
    return found


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=PROJECT / "docs" / "results" / "real")
    parser.add_argument("--take", nargs="*", type=Path, default=[], help="folders whose cells are added first")
    args = parser.parse_args(given)
    tables = {name: Table(args.results / f"{name}.csv", key) for name, key in KEYS.items()}
    for folder in args.take:
        for name, table in tables.items():
            print(f"{folder / name}.csv: {table.take(folder / f'{name}.csv')} rows taken")
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "tables.md").write_text("\n\n".join(parts(tables)) + "\n", encoding="utf-8")
    page, rows = args.results / "README.md", tables["methods"].rows
    if page.exists():
        text = put_between(page.read_text(encoding="utf-8"), "methods", methods_overview(rows))
        text = put_between(text, "attacks", attacks_overview(whole(tables["attacks"].rows)))
        page.write_text(text, encoding="utf-8")
    rows = [row for row in rows if not int(row["tuning"])]
    if rows:
        draw_methods(rows, args.results / "methods.png", reference_of(rows))
    if tables["attacks"].rows:
        draw_attacks(whole(tables["attacks"].rows), args.results / "attacks.png")
    if tables["protocol"].rows:
        draw_protocol(tables["protocol"].rows, args.results / "protocol.png")


if __name__ == "__main__":
    main()
