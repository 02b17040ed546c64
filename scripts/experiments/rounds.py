"""(g) What rounds add up to: contaminated clients that go on sending, seen by one round's evidence and by all so far.

    python -m scripts.experiments.rounds --cache CACHE

The attack table's text copying, clients and data attacks, played for several rounds by `FederatedTrainer`. CACHE is the
attack table's; finished runs are kept there, and a run that was stopped goes on where it was.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import csv
import itertools
import json
import shutil
import statistics
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from matplotlib.figure import Figure

from fedlora_hf import FederatedTrainer
from fedlora_hf.commands.demo import letter_tokenizer
from fedlora_hf.rounds import output
from fedlora_hf.util.disk import write_atomically
from scripts import PROJECT
from scripts.experiments.copying import (
    DATA_ATTACKS,
    REGIMES,
    Regime,
    base_model,
    client_lines,
    contaminated,
    options,
    suspects,
)
from scripts.experiments.tables import COLOURS

CLIENTS, MOST, ROUNDS = 12, 5, 4
CLEAN, BENIGN, JUDGED = "none", "fedavg of the benign", "clair, functional"
METHODS = ("clair", JUDGED, "multikrum", BENIGN)
# {method: what the trainer is told}. All judge all others; contaminated clients by their wrong validation lines.
OPTIONS: dict[str, dict[str, Any]] = {
    "clair": {"aggregation": "clair", "functional_judges": 0},
    JUDGED: {"aggregation": "clair", "functional_judges": "auto"},
    BENIGN: {"aggregation": "fedavg"},
}
# Those of which the attack table's single round leaves many unseen.
ATTACKS = DATA_ATTACKS[1:]
Row = dict[str, Any]


def cohort(regime: Regime, seed: int, attack: str, count: int) -> tuple[dict[str, DatasetDict], list[str]]:
    """({client: its lines}, contaminated clients): `count` of them train on wrong lines under their own names."""
    bad = suspects(seed, CLIENTS, MOST)[:count]
    lines = client_lines(seed, regime, CLIENTS, bad)
    names = {number: f"client-{number:02d}" for number in range(CLIENTS)}
    clients = {names[k]: lines[contaminated(k, attack)] if k in bad else lines[names[k]] for k in names}
    return clients, sorted(names[k] for k in bad)


def flagged(evidence: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> set[str]:
    """The clients one of whose scores is above its threshold."""
    return {
        client
        for client, kinds in evidence.items()
        for kind in kinds.values()
        if kind["threshold"] is not None and kind["score"] is not None and kind["score"] > kind["threshold"]
    }


def played(cache: Path, regime: Regime, seed: int, attack: str, count: int, method: str, rounds: int) -> list[Row]:
    """One run: a row a round."""
    clients, bad = cohort(regime, seed, attack, count)
    benign = sorted(set(clients) - set(bad))
    if method == BENIGN:
        clients = {name: clients[name] for name in benign}
    folder = cache / "rounds" / "run"
    shutil.rmtree(folder, ignore_errors=True)
    told = OPTIONS.get(method, {"aggregation": method})
    args = options(folder, regime, seed, rounds, keep_rounds=0, personalise="method", **told)
    trainer = FederatedTrainer(base_model(cache, seed), args, clients, processing_class=letter_tokenizer())
    trainer.train()
    tests = [row for name in benign for row in trainer.clients[name].test]
    rows = []
    for entry in trainer.run.record.rounds:
        row: Row = {"round": entry["round"]}
        # By the round's own evidence, and by all rounds until then, which is what the trainer goes by.
        for when, found in (("now", flagged(entry["evidence"])), ("so far", set(entry["flagged"]))):
            row[f"contaminated flagged {when}"] = len(found & set(bad))
            row[f"benign flagged {when}"] = len(found - set(bad))
        scores = trainer.scorer.metrics(trainer.store.state(entry["round"]), tests)
        rows.append(row | {"loss": round(scores["loss"], 5), "accuracy": round(scores["token_accuracy"], 5)})
    return rows


def cells(args: argparse.Namespace) -> list[tuple[Regime, int, str, int, str]]:
    """(regime, seed, attack, contaminated clients, method); the clean cohort and what the benign alone reach once."""
    regimes = [REGIMES["scarce"]] if args.quick else [REGIMES[name] for name in args.regimes]
    attacks = ATTACKS[:1] if args.quick else ATTACKS
    found = []
    for regime, seed in itertools.product(regimes, range(args.seed, args.seed + args.seeds)):
        found += [(regime, seed, CLEAN, 0, method) for method in METHODS[:-1]]
        for count in (MOST,) if args.quick else (MOST - 1, MOST):
            found += [(regime, seed, attack, count, method) for attack in attacks for method in METHODS[:-1]]
            found.append((regime, seed, attacks[0], count, BENIGN))
    return [cell for cell in found if cell[-1] in args.methods]


def table(args: argparse.Namespace) -> list[Row]:
    rows = []
    for regime, seed, attack, count, method in cells(args):
        name = f"{attack}-{count}-{method}-{args.rounds}.json"
        place = args.cache / "rounds" / regime.name / f"seed-{seed}" / name
        if not place.exists():
            found = played(args.cache, regime, seed, attack, count, method, args.rounds)
            write_atomically(place, json.dumps(found).encode())
            print(regime.name, seed, attack, count, method, found[-1], flush=True)
        key = {"regime": regime.name, "seed": seed, "attack": "any" if method == BENIGN else attack}
        key |= {"contaminated": count, "method": method}
        rows += [key | row for row in json.loads(place.read_text(encoding="utf-8"))]
    return rows


def _of(rows: Sequence[Row], **want: Any) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in want.items())]


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def detection(rows: Sequence[Row], method: str, last: int) -> list[str]:
    """Markdown: whom a method flags in the first round, in the last by itself, and by all rounds together."""
    places = [("first round", 1, "now"), (f"round {last} by itself", last, "now"), (f"{last} rounds", last, "so far")]
    head = ["regime", "attack", "contaminated", *(name for name, *_ in places)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    own = _of(rows, method=method)
    for regime, attack, count in dict.fromkeys((r["regime"], r["attack"], r["contaminated"]) for r in own):
        texts = []
        for _, number, when in places:
            found = _of(own, regime=regime, attack=attack, contaminated=count, round=number)
            bad, honest = (sum(r[f"{who} flagged {when}"] for r in found) for who in ("contaminated", "benign"))
            texts.append(f"{bad} of {count * len(found)}" + (f", {honest} benign" if honest else ""))
        lines.append("| " + " | ".join([regime, attack, str(count), *texts]) + " |")
    return lines


def losses(rows: Sequence[Row], last: int) -> list[str]:
    """Markdown: loss of the global adapter over the benign clients after the last round."""
    lines = ["| regime | attack | contaminated | " + " | ".join(METHODS) + " |", "|" + "---|" * (3 + len(METHODS))]
    ended = _of(rows, round=last)
    for regime, attack, count in dict.fromkeys((r["regime"], r["attack"], r["contaminated"]) for r in ended):
        if attack == "any":
            continue
        texts = []
        for method in METHODS:
            found = _of(ended, regime=regime, contaminated=count, method=method)
            found = found if method == BENIGN else _of(found, attack=attack)
            texts.append(_spread([r["loss"] for r in found]) if found else "")
        lines.append("| " + " | ".join([regime, attack, str(count), *texts]) + " |")
    return lines


def drawn(rows: Sequence[Row], last: int) -> Figure:
    """Share of the contaminated that are flagged by all rounds so far, by round."""
    judged = [row for row in rows if row["contaminated"] and row["method"] in METHODS[:2]]
    regimes, attacks = (list(dict.fromkeys(row[name] for row in judged)) for name in ("regime", "attack"))
    figure, numbers = Figure(figsize=(4.6 * len(regimes), 3.8), layout="constrained"), range(1, last + 1)
    for axes, regime in zip(figure.subplots(1, len(regimes), sharey=True, squeeze=False)[0], regimes, strict=True):
        for (attack, colour), (method, style) in itertools.product(
            zip(attacks, COLOURS, strict=False), zip(METHODS[:2], ("o--", "s-"), strict=True)
        ):
            found = [_of(judged, regime=regime, attack=attack, method=method, round=n) for n in numbers]
            hits = [sum(r["contaminated flagged so far"] for r in f) / sum(r["contaminated"] for r in f) for f in found]
            axes.plot(numbers, hits, style, color=colour, markersize=4, label=f"{attack}: {method}")
        axes.set(title=f"{regime} data", xlabel="round", ylim=(-0.03, 1.03), xticks=numbers)
    figure.axes[0].set_ylabel("contaminated clients flagged")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--quick", action="store_true", help="one regime, one attack, to see that it runs")
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=list(REGIMES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--cache", type=Path, required=True, help="folder for base models and finished runs")
    default = PROJECT / "docs" / "results" / "rounds"
    parser.add_argument("--output_dir", type=Path, default=default)
    args = parser.parse_args(arguments)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    output.write_report = lambda record, folder: []  # type: ignore[assignment]  # most of a short run's time
    warnings.filterwarnings("ignore")
    rows = table(args)
    with open(args.output_dir / "rounds.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    parts = ["# Evidence over rounds", "", "Written by `rounds.py`.", ""]
    for method in METHODS[:2]:
        parts += [f"## Flagged by {method}, all seeds together", "", *detection(rows, method, args.rounds), ""]
    parts += [f"## Global loss on the benign clients after {args.rounds} rounds", "", *losses(rows, args.rounds), ""]
    (args.output_dir / "tables.md").write_text("\n".join(parts), encoding="utf-8")
    drawn(rows, args.rounds).savefig(args.output_dir / "rounds.png", dpi=150)


if __name__ == "__main__":
    main()
