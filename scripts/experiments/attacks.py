"""(f) The attack table: text copying with a Transformer, attacks on real updates x contaminated share x rule."""
# SPDX-License-Identifier: Apache-2.0

import argparse
import gc
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedlora_hf.aggregation import aggregate
from fedlora_hf.training import personal as personalise
from fedlora_hf.update import AdapterState, ClientUpdate
from fedlora_hf.util.disk import write_atomically
from fedlora_hf.util.seeding import derive_seed
from scripts import PROJECT
from scripts.experiments.attack_report import Row, write_report
from scripts.experiments.copying import DATA_ATTACKS, RANK, REGIMES, Federation, Regime, tune
from scripts.experiments.other_aggregators import Rule, rules
from scripts.experiments.update_attacks import UPDATE_ATTACKS, Knowledge
from scripts.experiments.vectors import flat, shaped, stacked

CLEAN = "none"
ATTACKS = (*DATA_ATTACKS, *UPDATE_ATTACKS)
# Our rules: {name: (method, options)}, at their defaults, but for CLAIR: here whoever is not flagged counts in full;
# what its smooth influence adds is measured by `influence.py`, against attackers who know the rules.
OURS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "fedavg": ("fedavg", {}),
    "product_mean": ("product_mean", {}),
    "clair hard": ("clair", {"refine": "hard", "influence": "flags"}),
    "clair soft": ("clair", {"refine": "soft", "influence": "flags"}),
    "median": ("median", {}),
    "trimmed_mean": ("trimmed_mean", {}),
    "multikrum": ("multikrum", {}),
    "geometric_median": ("geometric_median", {}),
}
# Not rules but what rules are held against: every client alone, and FedAvg told who is contaminated.
ALONE, ORACLE = "local", "fedavg of the benign"
# Rules whose clients also choose between the global adapter, their own, mixtures, and the refined one.
CHOOSING = ("fedavg", "multikrum", "clair hard", "clair soft")


@dataclass(frozen=True, eq=False)
class Cohort:
    """What the server gets. updates: {client: adapter}, as sent; bad: the contaminated clients' names."""

    updates: Mapping[str, AdapterState]
    bad: frozenset[str]

    @property
    def benign(self) -> list[str]:
        return [name for name in self.updates if name not in self.bad]


@dataclass(frozen=True, eq=False)
class Combined:
    """What a rule makes of a cohort. left_out: the clients it kept out; None for a rule that mixes all."""

    state: AdapterState
    left_out: frozenset[str] | None = None
    refined: Mapping[str, AdapterState] = field(default_factory=dict)


def cohort(federation: Federation, attack: str, count: int) -> Cohort:
    """The federation's round with its first `count` suspects contaminated by `attack`."""
    bad = sorted(federation.suspects[:count])
    kind = attack if attack in DATA_ATTACKS else ""
    updates = {n: federation.update(k, kind if k in bad else "") for k, n in enumerate(federation.honest)}
    names = frozenset(federation.honest[k] for k in bad)
    if attack in UPDATE_ATTACKS:
        honest = [state for name, state in updates.items() if name not in names]
        known = Knowledge(federation.start, honest, derive_seed(federation.seed, attack))
        for number in bad:
            name = federation.honest[number]
            updates[name] = UPDATE_ATTACKS[attack](updates[name], known, number)
    return Cohort(updates, names)


def combine(rule: str, sent: Cohort, start: AdapterState, others: Mapping[str, Rule]) -> Combined:
    """Apply one rule. The rules of other libraries are told how many are contaminated."""
    if rule in others:
        chosen = others[rule](stacked(list(sent.updates.values())), flat(start), len(sent.bad))
        names = list(sent.updates)
        kept = None if chosen.clients is None else {names[k] for k in chosen.clients}
        return Combined(shaped(chosen.vector, start), None if kept is None else frozenset(names) - kept)
    names = sent.benign if rule == ORACLE else list(sent.updates)
    method, options = OURS["fedavg" if rule == ORACLE else rule]
    updates = [ClientUpdate(name, sent.updates[name]) for name in names]
    found = aggregate(updates, method, target_rank=RANK, **options)
    left_out = None
    if method == "clair":
        left_out = frozenset(found.flagged) | frozenset(found.quarantined)
    elif method == "multikrum":
        left_out = frozenset(name for name in names if not found.weights.get(name))
    return Combined(found.state, left_out, found.personalised)


def measured(rule: str, federation: Federation, sent: Cohort, others: Mapping[str, Rule]) -> Row:
    """Detection, and losses over the benign clients, of one rule on one cohort: of its global adapter, of what it makes
    of each client's own ("personal"), and of what the client chooses on its validation lines ("chosen")."""
    if rule == ALONE:
        alone = _mean([federation.alone[name] for name in sent.benign])
        return {**detection(None, sent), **_scores("global"), **_scores("personal", alone), **_scores("chosen")}
    found = combine(rule, sent, federation.start, others)
    row = detection(found.left_out, sent) | _scores("global", federation.score(found.state, sent.benign, "test"))
    refined = None
    if rule.startswith("clair"):
        given = {n: personalise.given(found.state, sent.updates[n], found.refined.get(n)).state for n in sent.benign}
        refined = _mean([federation.score(state, [name], "test") for name, state in given.items()])
    row |= _scores("personal", refined)
    if rule not in CHOOSING:
        return row | _scores("chosen")
    choices = {name: _choice(federation, found, name, sent.updates[name]) for name in sent.benign}
    counts = Counter(choice for choice, _ in choices.values())
    chosen = _mean([federation.score(state, [name], "test") for name, (_, state) in choices.items()])
    return row | _scores("chosen", chosen, ", ".join(f"{choice} {number}" for choice, number in counts.most_common()))


def _choice(federation: Federation, found: Combined, name: str, own: AdapterState) -> tuple[str, AdapterState]:
    """What a client takes of all that it is offered, by the loss on its validation lines."""
    offered = personalise.candidates(found.state, own, found.refined.get(name), RANK)
    found = personalise.best(offered, lambda state: federation.score(state, [name], "validation")[0])
    return str(found.choice), found.state


def _mean(scores: Sequence[tuple[float, float]]) -> tuple[float, float]:
    loss, accuracy = np.mean(scores, axis=0).tolist()
    return loss, accuracy


def detection(left_out: frozenset[str] | None, sent: Cohort) -> Row:
    """precision is empty where nobody is left out, recall where nobody is contaminated."""
    if left_out is None:
        return dict.fromkeys(("left_out", "false_positives", "precision", "recall"), "")
    hits = len(left_out & sent.bad)
    return {
        "left_out": len(left_out),
        "false_positives": len(left_out - sent.bad),
        "precision": round(hits / len(left_out), 4) if left_out else "",
        "recall": round(hits / len(sent.bad), 4) if sent.bad else "",
    }


def _scores(kind: str, score: tuple[float, float] | None = None, choices: str | None = None) -> Row:
    loss, accuracy = ("", "") if score is None else (round(score[0], 5), round(score[1], 5))
    row: dict[str, str | int | float] = {f"{kind}_loss": loss, f"{kind}_accuracy": accuracy}
    return row | ({"choices": choices or ""} if kind == "chosen" else {})


def cells(attacks: Sequence[str], counts: Sequence[int]) -> Iterator[tuple[str, int]]:
    """(attack, contaminated clients): the clean cohort once, then every attack at every other share."""
    yield CLEAN, 0
    yield from ((attack, count) for attack in attacks for count in counts if count)


def table(args: argparse.Namespace) -> list[Row]:
    """One row for each seed, regime, cell and rule; those already in the cache are read, but for `--again`."""
    others = rules()
    names = [ALONE, ORACLE, *OURS, *others]
    attacks, counts, size = list(ATTACKS), [0, 1, 4, 5], 12
    if args.quick:
        attacks, counts, size = ["random targets", "sign flip"], [0, 1], 4
    rows: list[Row] = []
    for regime in [REGIMES["scarce"]] if args.quick else REGIMES.values():
        for seed in range(args.seed, args.seed + args.seeds):
            print(f"{regime.name}, seed {seed}", flush=True)
            rows += _of_one(seed, regime, args, size, max(counts), list(cells(attacks, counts)), names, others)
    return rows


def _of_one(
    seed: int,
    regime: Regime,
    args: argparse.Namespace,
    size: int,
    most: int,
    wanted: Sequence[tuple[str, int]],
    names: Sequence[str],
    others: Mapping[str, Rule],
) -> list[Row]:
    """The rows of one seed in one regime."""
    federation = Federation(seed, regime, args.cache, size, most)
    gc.freeze()  # Flower collects garbage at every array it reads, and would look through all of the above each time
    rows = []
    for attack, count in wanted:
        sent = cohort(federation, attack, count)
        for rule in names:
            place = federation.folder / "rows" / f"{attack}-{count}" / f"{rule}.json"
            if place.exists() and not rule.startswith(tuple(args.again)):
                row = json.loads(place.read_text(encoding="utf-8"))
            else:
                row = measured(rule, federation, sent, others)
                write_atomically(place, json.dumps(row).encode())
            key = {"regime": regime.name, "seed": seed, "attack": attack, "contaminated": count, "clients": size}
            rows.append({**key, "rule": rule, **row})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--quick", action="store_true", help="four clients, two attacks, one regime")
    parser.add_argument("--tune", action="store_true", help="only try learning rates for clients alone")
    parser.add_argument("--cache", type=Path, required=True, help="folder for trained updates and finished rows")
    parser.add_argument("--again", nargs="*", default=[], help="rules (beginnings of names) to run anew, e.g. clair")
    default = PROJECT / "docs" / "results" / "attacks"
    parser.add_argument("--output_dir", type=Path, default=default)
    args = parser.parse_args(arguments)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.tune:
        tune(args.cache, args.output_dir / "tuning.csv")
    else:
        write_report(args.output_dir, table(args))


if __name__ == "__main__":
    main()
