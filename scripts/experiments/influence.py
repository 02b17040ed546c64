"""(i) Influence: attackers who know the rules, on text copying; damage and loss under each rule, the oracle beside.

    python -m scripts.experiments.influence --cache CACHE             # attacks.csv
    python -m scripts.experiments.influence --cache CACHE --rounds    # sleepers and slow drift: rounds.csv
    python -m scripts.experiments.influence --cache CACHE --report    # tables.md and the figure, from both

Twelve clients with few lines each (the scarce half of `attacks.py`), four contaminated unless the cell says otherwise.
What the attackers want learned is one permutation of the letters that they share.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import json
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora_hf.aggregation import aggregate
from fedlora_hf.aggregation.attacks import ATTACKS, Known, attacked, backdoor, combination, inner, norm, trigger
from fedlora_hf.aggregation.cohort import PastRound
from fedlora_hf.methods import METHODS
from fedlora_hf.update import AdapterState, Aggregate, ClientUpdate
from fedlora_hf.util.disk import write_atomically
from fedlora_hf.util.seeding import derive_seed
from scripts import PROJECT
from scripts.experiments.copying import RANK, REGIMES, Federation
from scripts.experiments.influence_report import write_report
from scripts.experiments.tables import write_csv

Row = dict[str, Any]
CLEAN, ORACLE, WRONG = "none", "oracle", "colluding permutation"
CLIENTS, MOST, ROUNDS = 12, 8, 8
RULES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "clair": ("clair", {}),
    "clair, flags": ("clair", {"influence": "flags"}),
    "multikrum": ("multikrum", {}),
    "geometric_median": ("geometric_median", {}),
    "median": ("median", {}),
    "product_mean": ("product_mean", {}),
    "norm_clipping": ("norm_clipping", {}),
    "centred_clipping": ("centred_clipping", {}),
}
# Of the catalogue, those that take one round; the others run over rounds.
OVER_ROUNDS = ("sleepers", "slow-drift")
DATA = ("permuted labels", "colluding permutation")
SIZES = (0.5, 1.0, 2.0, 4.0)  # of the backdoor


def cells(quick: bool = False) -> Iterator[tuple[str, int]]:
    """(attack, contaminated clients)."""
    yield CLEAN, 0
    if quick:
        yield "mixed", 1
        return
    yield from ((attack, count) for attack in DATA for count in (4, 5))
    for attack in ATTACKS:
        if attack not in OVER_ROUNDS:
            yield attack, MOST if attack == "one-module" else 4
    yield from ((f"backdoor x{size:g}", 4) for size in SIZES if size != 2)


def knowledge(federation: Federation, count: int) -> Known:
    """What `count` attackers know; the rest of the clients is honest."""
    bad = sorted(federation.suspects[:count])
    states = {name: federation.update(k) for k, name in enumerate(federation.honest)}
    own = {federation.honest[k]: states[federation.honest[k]] for k in bad}
    return Known(
        {name: state for name, state in states.items() if name not in own},
        own,
        wrong=federation.update(bad[0], WRONG) if bad else None,
        start=federation.start,
        seed=derive_seed(federation.seed, "attackers"),
        rule=lambda sent: combined("clair", sent).state,
    )


def combined(rule: str, sent: Mapping[str, AdapterState], **more: Any) -> Aggregate:
    method, options = RULES[rule]
    return aggregate([ClientUpdate(n, s) for n, s in sent.items()], method, target_rank=RANK, **options, **more)


def cohort(federation: Federation, attack: str, known: Known) -> dict[str, AdapterState]:
    """{client: what it sends}."""
    if attack == CLEAN:
        return dict(known.honest)
    if attack in DATA:
        number = {name: k for k, name in enumerate(federation.honest)}
        return {**known.honest, **{name: federation.update(number[name], attack) for name in known.own}}
    if attack.startswith("backdoor x"):
        return {**known.honest, **backdoor(known, float(attack.split("x")[1]))}
    return {**known.honest, **attacked(attack, known)}


def measured(federation: Federation, known: Known, found: Aggregate, benign: AdapterState) -> Row:
    """Damage ||W - W_benign|| / ||W_benign||, what landed of the backdoor, loss of the honest, flags, and what is left
    of the contaminated clients' influence."""
    right, got = known.change(benign), known.change(found.state)
    off = combination([(1.0, got), (-1.0, right)])
    kept = [found.influence[name] for name in known.own] if found.influence else []
    loss, accuracy = federation.score(found.state, sorted(known.honest), "test")
    return {
        "damage": round(norm(off) / norm(right), 4),
        "landed": round(inner(off, trigger(known)) / known.size, 4),
        "loss": round(loss, 5),
        "accuracy": round(accuracy, 5),
        "found": len(set(found.flagged) & set(known.own)),
        "wrongly flagged": len(set(found.flagged) - set(known.own)),
        "suspicious": len(set(found.suspicious) & set(known.own)),
        "kept": round(sum(kept) / len(kept), 4) if kept else "",
    }


def made(seed: int, args: argparse.Namespace) -> Federation:
    """The federation of one seed; with --quick one of four clients."""
    return Federation(seed, REGIMES["scarce"], args.cache, 4 if args.quick else CLIENTS, 1 if args.quick else MOST)


def rows_of(seed: int, args: argparse.Namespace) -> Iterator[Row]:
    """One row a cell and rule; rows in the cache are read."""
    federation: Federation | None = None
    for attack, count in cells(args.quick):
        known = sent = benign = None
        for rule in (ORACLE, *RULES):
            if rule != ORACLE and RULES[rule][0] not in METHODS:
                continue
            place = args.cache / "influence" / f"seed-{seed}" / f"{attack}-{count}" / f"{rule}.json"
            if not place.exists() or rule.startswith(tuple(args.again)):
                federation = federation or made(seed, args)
                if known is None or sent is None or benign is None:
                    known = knowledge(federation, count)
                    sent = cohort(federation, attack, known)
                    benign = combined("product_mean", known.honest).state
                began = time.process_time()
                found = combined(rule, sent) if rule != ORACLE else combined("product_mean", known.honest)
                seconds = round(time.process_time() - began, 3)
                row = measured(federation, known, found, benign) | {"seconds": seconds}
                write_atomically(place, json.dumps(row).encode())
                print(seed, attack, count, rule, row, flush=True)
            row = json.loads(place.read_text(encoding="utf-8"))
            yield {"seed": seed, "attack": attack, "contaminated": count, "rule": rule, **row}


def played(federation: Federation, attack: str, rule: str, count: int = 4) -> Iterator[Row]:
    """Rounds of one attack under one rule, each from the rule's own global adapter; rule ORACLE: the honest alone."""
    trainer, state, past = federation.trainer, federation.start, []
    bad = sorted(federation.suspects[:count]) if attack != CLEAN else []
    names = {federation.honest[k] for k in bad}
    for number in range(1, ROUNDS + 1):
        trainer.run.state, trainer.run.round = state, number - 1
        trained = {name: trainer.train_client(name, number).state.in_memory() for name in federation.honest}
        own = {name: trained[name] for name in names}
        honest = {name: update for name, update in trained.items() if name not in names}
        wrong = f"{WRONG.replace(' ', '-')}-{bad[0]:02d}" if bad else ""
        aim = trainer.train_client(wrong, number).state.in_memory() if bad else None
        known = Known(honest, own, aim, state, derive_seed(federation.seed, "attackers"), number)
        sent = {**honest, **attacked(attack, known)} if bad and rule != ORACLE else honest
        name = "product_mean" if rule == ORACLE else rule
        found = combined(name, sent, reference=state, past=tuple(past))
        past.append(PastRound(found.this_round or found.evidence, frozenset(found.flagged)))
        benign = combined("product_mean", honest, reference=state).state
        yield {"round": number, **measured(federation, known, found, benign)}
        state = found.state


def rounds_of(seed: int, args: argparse.Namespace) -> Iterator[Row]:
    federation: Federation | None = None
    for attack in OVER_ROUNDS:
        for rule in (ORACLE, "clair", "clair, flags", "multikrum"):
            place = args.cache / "influence" / f"seed-{seed}" / f"{attack}-rounds" / f"{rule}.json"
            if not place.exists():
                federation = federation or made(seed, args)
                found = list(played(federation, attack, rule))
                write_atomically(place, json.dumps(found).encode())
                print(seed, attack, rule, [(row["loss"], row["found"]) for row in found], flush=True)
            key = {"seed": seed, "attack": attack, "rule": rule}
            yield from (key | row for row in json.loads(place.read_text(encoding="utf-8")))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12, 13, 14])
    parser.add_argument("--quick", action="store_true", help="four clients, one attack, to see that it runs")
    parser.add_argument("--rounds", action="store_true", help="the attacks over rounds")
    parser.add_argument("--report", action="store_true", help="only write tables and figure")
    parser.add_argument("--again", nargs="*", default=["-"], help="rules (beginnings of names) to run anew")
    parser.add_argument("--cache", type=Path, required=True, help="folder for trained updates and finished rows")
    default = PROJECT / "docs" / "results" / "influence"
    parser.add_argument("--output_dir", type=Path, default=default)
    args = parser.parse_args(arguments)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore")
    if args.report:
        write_report(args.output_dir)
        return
    take, name = (rounds_of, "rounds.csv") if args.rounds else (rows_of, "attacks.csv")
    write_csv(args.output_dir / name, [row for seed in args.seeds for row in take(seed, args)])


if __name__ == "__main__":
    main()
