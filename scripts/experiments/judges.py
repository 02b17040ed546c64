"""(j) Judges: what others' losses tell of every attack of the catalogue, by honest judges and by liars.

    python -m scripts.experiments.judges --cache CACHE             # judges.csv
    python -m scripts.experiments.judges --cache CACHE --report    # tables.md

The cohorts of `influence.py`: twelve clients with few lines each, one round. Contaminated clients judge by their own
honest lines ("sound"), or they lie as best they can ("lies"): whoever is honest ruins them, whoever is not does them
nothing but good. All twelve judge, or a panel of 5 and one more drawn at random.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import csv
import json
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora_hf.aggregation.attacks import Known
from fedlora_hf.rounds.judges import Functional, functional_evidence, mixture
from fedlora_hf.rounds.panel import Split, drawn
from fedlora_hf.update import AdapterState, Aggregate
from fedlora_hf.util.disk import write_atomically
from scripts import PROJECT
from scripts.experiments.attack_report import grid
from scripts.experiments.copying import REGIMES, Federation
from scripts.experiments.influence import CLIENTS, MOST, cells, cohort, combined, knowledge
from scripts.experiments.tables import write_csv

Row = dict[str, Any]
Losses = dict[str, float]
PANELS, MANNERS = ("all", "5"), ("sound", "lies")
TUNED = (10, 11, 20)  # seeds that were looked at while the rule was made


def losses(federation: Federation, state: AdapterState) -> Losses:
    """{client: validation loss of an adapter on its honest lines}."""
    rows = [(name, row) for name in federation.honest for row in federation.splits["validation"][name]]
    return federation.trainer.scorer.losses(state, [row for _, row in rows], [name for name, _ in rows])


def matrix(
    federation: Federation, found: Aggregate, sent: Mapping[str, AdapterState]
) -> tuple[list[Losses], dict[str, Losses]]:
    """(losses under start, mean and diluted mean, {client: losses under the mean with its share})."""
    states = (federation.start, found.state, mixture(found.state, federation.start))
    beside = [losses(federation, state) for state in states]
    return beside, {name: losses(federation, mixture(found.state, state)) for name, state in sent.items()}


def lied(beside: Sequence[Losses], mixed: Mapping[str, Losses], bad: set[str]) -> dict[str, Losses]:
    """The same with the words of the contaminated: ten times the loss from an honest update, none from their own."""
    start = beside[0]
    return {
        client: {
            judge: (0.0 if client in bad else 10 * start[judge]) if judge in bad else loss
            for judge, loss in row.items()
        }
        for client, row in mixed.items()
    }


def judged(
    found: Aggregate, panel: str, beside: Sequence[Losses], mixed: Mapping[str, Losses], seed: int
) -> Functional:
    ids = sorted(mixed)
    chosen = ids if panel == "all" else drawn({name: Split(1, 1.0) for name in ids}, int(panel) + 1, seed)
    rows = [{judge: row[judge] for judge in chosen} for row in beside]
    return functional_evidence(*rows, {c: {j: row[j] for j in chosen} for c, row in mixed.items()}, found.influence)


def told(known: Known, found: Aggregate, how: Functional, both: Aggregate, losses: tuple[float, float]) -> Row:
    """Who is flagged and what is left of influence without and with the judges (`found`, `both`), the scores on both
    sides of the gap, and the loss of the honest."""
    bad = set(known.own)
    scores = {client: evidence.score for client, evidence in how.evidence.items()}
    by_judges = {client for client, evidence in how.evidence.items() if evidence.flagged}
    kept = {
        f"{who}_kept_{when}": round(statistics.mean(it.influence[name] for name in names), 4) if names else ""
        for when, it in (("updates", found), ("both", both))
        for who, names in (("contaminated", bad), ("honest", known.honest))
    }
    changes = [effect.change for client, effect in how.effects.items() if client in bad]
    return {
        "usable": int(any(evidence.threshold is not None for evidence in how.evidence.values())),
        "updates_found": len(set(found.flagged) & bad),
        "judges_found": len(by_judges & bad),
        "both_found": len(set(both.flagged) & bad),
        "updates_wrong": len(set(found.flagged) - bad),
        "judges_wrong": len(by_judges - bad),
        "both_wrong": len(set(both.flagged) - bad),
        "highest_honest": round(max(scores[name] for name in known.honest), 4),
        "lowest_contaminated": round(min((scores[name] for name in bad), default=0.0), 4) if bad else "",
        "change": round(statistics.median(changes), 4) if changes else "",
        **kept,
        "loss_updates": round(losses[0], 4),
        "loss_both": round(losses[1], 4),
    }


def cell(federation: Federation, attack: str, count: int) -> list[Row]:
    """One row a panel and manner of judging."""
    known = knowledge(federation, count)
    sent = cohort(federation, attack, known)
    found = combined("clair", sent)
    beside, mixed = matrix(federation, found, sent)
    honest, reached, rows = sorted(known.honest), dict[tuple[float, ...], float](), list[Row]()

    def loss(it: Aggregate) -> float:
        """Of the honest; equal weights give equal adapters, which are scored once."""
        key = tuple(it.weights.values())
        if key not in reached:
            reached[key] = federation.score(it.state, honest, "test")[0]
        return reached[key]

    for panel in PANELS:
        for manner in MANNERS if count else MANNERS[:1]:
            said = mixed if manner == "sound" else lied(beside, mixed, set(known.own))
            how = judged(found, panel, beside, said, federation.seed)
            both = combined("clair", sent, functional=how.evidence)
            key = {"seed": federation.seed, "attack": attack, "contaminated": count, "panel": panel, "judging": manner}
            rows.append(key | told(known, found, how, both, (loss(found), loss(both))))
    return rows


def rows_of(seed: int, args: argparse.Namespace) -> Iterator[Row]:
    """One row a cell, panel and manner of judging; cells in the cache are read."""
    federation: Federation | None = None
    for attack, count in cells(args.quick):
        place = args.cache / "judges" / f"seed-{seed}" / f"{attack}-{count}.json"
        if not place.exists():
            federation = federation or Federation(
                seed, REGIMES["scarce"], args.cache, 4 if args.quick else CLIENTS, 1 if args.quick else MOST
            )
            rows = cell(federation, attack, count)
            write_atomically(place, json.dumps(rows).encode())
            print(*rows, sep="\n", flush=True)
        yield from json.loads(place.read_text(encoding="utf-8"))


def table(rows: Sequence[Mapping[str, str]], panel: str, manner: str) -> str:
    """Markdown: a row an attack, sums over the seeds."""
    mine = [
        row for row in rows if row["panel"] == panel and row["judging"] in (manner, "" if manner == "sound" else manner)
    ]
    lines = []
    for attack, count in dict.fromkeys((row["attack"], row["contaminated"]) for row in mine):
        cell = [row for row in mine if (row["attack"], row["contaminated"]) == (attack, count)]
        every, clients = int(count) * len(cell), CLIENTS * len(cell)

        def total(name: str, cell: Sequence[Mapping[str, str]] = cell) -> int:
            return sum(int(row[name]) for row in cell)

        low = [float(row["lowest_contaminated"]) for row in cell if row["lowest_contaminated"]]
        pairs = []
        for name in ("contaminated_kept", "honest_kept", "loss"):
            values = [[float(r[f"{name}_{when}"]) for r in cell if r[f"{name}_{when}"]] for when in ("updates", "both")]
            pairs.append(", ".join(f"{statistics.mean(found):.2f}" if found else "-" for found in values))
        lines.append(
            [
                f"{attack}, {count}",
                f"{total('usable')} of {len(cell)}",
                *(f"{total(f'{who}_found')} of {every}" if every else "-" for who in ("updates", "judges", "both")),
                f"{total('judges_wrong')} of {clients - every}",
                f"{max(float(row['highest_honest']) for row in cell):.2f}",
                f"{min(low):.2f}" if low else "-",
                *pairs,
            ]
        )
    head = ["attack, contaminated", "usable", "found by updates", "by judges", "by both", "honest flagged by judges"]
    head += ["highest honest score", "lowest contaminated"]
    return grid([*head, *(f"{what} without, with judges" for what in ("their influence", "honest", "loss"))], lines)


def write_report(folder: Path) -> None:
    with open(folder / "judges.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    parts = ["# Judges: the tables", "", "Written by `judges.py --report`.", ""]
    groups = [("looked at while the rule was made", [r for r in rows if int(r["seed"]) in TUNED])]
    groups += [("held out", [r for r in rows if int(r["seed"]) not in TUNED])]
    for name, own in groups:
        for panel in PANELS if own else ():
            for manner in MANNERS:
                seeds = ", ".join(dict.fromkeys(row["seed"] for row in own))
                parts += [f"## Panel {panel}, contaminated judge: {manner}; seeds {name} ({seeds})", ""]
                parts += [table(own, panel, manner), ""]
    (folder / "tables.md").write_text("\n".join(parts), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 20, 21, 22])
    parser.add_argument("--quick", action="store_true", help="four clients, one attack, to see that it runs")
    parser.add_argument("--report", action="store_true", help="only write the tables")
    parser.add_argument("--cache", type=Path, required=True, help="the cache of influence.py")
    parser.add_argument("--output_dir", type=Path, default=PROJECT / "docs" / "results" / "judges")
    args = parser.parse_args(arguments)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore")
    if args.report:
        write_report(args.output_dir)
        return
    write_csv(args.output_dir / "judges.csv", [row for seed in args.seeds for row in rows_of(seed, args)])


if __name__ == "__main__":
    main()
