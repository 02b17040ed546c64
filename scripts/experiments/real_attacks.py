"""CLAIR's question on real bases: who is found, and what is it worth to the honest, one round of real updates.

    python -m scripts.experiments.real_attacks --base base-7m --data DATA --output_dir docs/results/real

Clients with iid, Dirichlet or single-task shares of Natural Instructions, `--bad` of them contaminated. Every client
trains once (contaminated ones once more on each kind of wrong answers); every rule combines the same updates. Under
"clair, judges" each update is also tried on the validation data of all clients, those of the contaminated being as
wrong as what they train on. Losses are means over the honest clients' test examples: of the global adapter, and of what
the rule leaves each of them. A row a cell; seeds and attacks that are in the csv are not run again.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import gc
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from fedlora_hf.aggregation import aggregate
from fedlora_hf.data.contaminate import contaminate
from fedlora_hf.rounds import judging
from fedlora_hf.rounds.panel import Panel
from fedlora_hf.training.personal import given
from fedlora_hf.update import AdapterState, Aggregate, ClientUpdate
from fedlora_hf.util.seeding import derive_seed
from scripts.experiments.real_cells import (
    INSTRUCTIONS,
    Clients,
    Row,
    Table,
    add_flags,
    options,
    parsed,
    scores,
    trainer_of,
)
from scripts.experiments.update_attacks import UPDATE_ATTACKS, Knowledge

KEY = ("base", "split", "seed", "attack", "rule")
DATA_ATTACKS = {"random answers": "random_outputs", "shuffled answers": "shuffled", "constant answers": "constant"}
ATTACKS = ("none", *DATA_ATTACKS, "sign flip", "boost x10")
JUDGED = "clair, judges"
RULES = ("local", "fedavg", "multikrum", "clair", JUDGED)
SPLITS = {"iid": "iid", "dirichlet": "dirichlet", "tasks": "task"}


class Cohort:
    """One seed's clients, trained when they are first asked for."""

    def __init__(self, args: argparse.Namespace, split: str, seed: int) -> None:
        groups, number = (args.clients, None) if split == "tasks" else (args.tasks, args.clients)
        clients = Clients(split, INSTRUCTIONS, SPLITS[split], groups=groups, num_clients=number)
        found: dict[str, Any] = clients.of(args.data, seed, args.examples, args.validation_share, args.test_share)
        self.names = sorted(found)
        rng = np.random.default_rng(derive_seed(seed, "suspects"))
        self.bad = sorted(rng.choice(self.names, args.bad, replace=False).tolist())
        self.honest = [name for name in self.names if name not in self.bad]
        for kind in DATA_ATTACKS.values():
            for name in self.bad:
                wrong = {
                    split: contaminate(found[name][split], kind, derive_seed(seed, kind, name))
                    for split in ("train", "validation")
                }
                found[f"{kind}-{name}"] = datasets.DatasetDict({**found[name], **wrong})
        flags = ["--num_rounds", "1", "--local_steps", str(args.steps), "--max_length", str(args.max_length)]
        flags += ["--per_device_train_batch_size", str(args.batch), "--learning_rate", str(args.rate), *args.more]
        self.seed, self.trainer = seed, trainer_of(options(args.base, args.cache / "run", seed, flags), found)
        self.found: dict[str, AdapterState] = {}

    def update(self, name: str) -> AdapterState:
        if name not in self.found:
            self.found[name] = self.trainer.train_client(name, 1).state.in_memory()
        return self.found[name]

    def sent(self, attack: str) -> dict[str, AdapterState]:
        """{client: what the server gets of it}."""
        sent = {name: self.update(name) for name in self.names}
        known = Knowledge(self.trainer.initial, [sent[n] for n in self.honest], derive_seed(self.seed, attack))
        for name in self.bad if attack != "none" else ():
            if attack in DATA_ATTACKS:
                sent[name] = self.update(f"{DATA_ATTACKS[attack]}-{name}")
            else:
                sent[name] = UPDATE_ATTACKS[attack](sent[name], known, self.names.index(name))
        return sent

    def judged(self, attack: str, updates: Sequence[ClientUpdate], found: Aggregate) -> Aggregate:
        """CLAIR once more, with what every update does on the validation data of all clients."""
        kind = DATA_ATTACKS.get(attack)
        own = {name: f"{kind}-{name}" if kind and name in self.bad else name for name in self.names}
        validation = {name: self.trainer.clients[own[name]].validation for name in self.names}
        panel = Panel({name: len(rows) for name, rows in validation.items()}, 0.0)
        given = (self.trainer.scorer, panel, validation, self.trainer.initial, found.state, found.influence)
        evidence = judging.measured(*given, updates, self.trainer.processes, self.seed).evidence
        return aggregate(updates, "clair", target_rank=self.rank, functional=evidence)

    @property
    def rank(self) -> int:
        return next(iter(self.trainer.initial.values())).rank

    def loss(self, states: Mapping[str, AdapterState]) -> float:
        """Mean test loss of the honest clients under their adapters."""
        return statistics.fmean(scores(self.trainer, name, states[name], "test")["loss"] for name in self.honest)


def measured(cohort: Cohort, attack: str, sent: Mapping[str, AdapterState], rule: str) -> Row:
    """Losses and detection of one rule on what was sent."""
    if rule == "local":
        return {"global_loss": "", "personal_loss": round(cohort.loss(sent), 5)} | dict.fromkeys(FOUND, "")
    updates = [ClientUpdate(name, state) for name, state in sent.items()]
    found = aggregate(updates, "clair" if rule == JUDGED else rule, target_rank=cohort.rank)
    if rule == JUDGED:
        found = cohort.judged(attack, updates, found)
    out: set[str] = set(found.flagged) | set(found.quarantined)
    if rule == "multikrum":
        out = {name for name in sent if not found.weights.get(name)}
    one = cohort.loss(dict.fromkeys(cohort.honest, found.state))
    own = {n: given(found.state, None, found.personalised.get(n)).state for n in cohort.honest}
    personal = cohort.loss(own) if found.personalised else one
    hits = ["", ""] if rule == "fedavg" else [len(out & set(cohort.bad)), len(out & set(cohort.honest))]
    kept = sum(found.weights.get(name, 0.0) for name in cohort.bad) / max(sum(found.weights.values()), 1e-12)
    values = (*hits, round(kept, 4))
    return {"global_loss": round(one, 5), "personal_loss": round(personal, 5)} | dict(zip(FOUND, values, strict=True))


FOUND = ("found", "wrongly_out", "weight_of_bad")


def run(args: argparse.Namespace, table: Table) -> None:
    for seed in args.seeds[: 1 if args.quick else None]:
        for split in args.splits:
            keys = {"base": args.base_name, "split": split, "seed": seed}
            wanted = [a for a in args.attacks if not table.has(**keys, attack=a, rule=JUDGED)]
            cohort = Cohort(args, split, seed) if wanted else None
            for attack in wanted:
                assert cohort is not None
                sent = cohort.sent(attack)
                rows = []
                for rule in RULES:
                    bad = 0 if attack == "none" else args.bad
                    facts = {"clients": args.clients, "contaminated": bad}
                    rows.append(
                        {**keys, "attack": attack, "rule": rule, **facts, **measured(cohort, attack, sent, rule)}
                    )
                table.add(rows)
                print(*(list(row.values()) for row in rows), sep="\n", flush=True)
            del cohort
            gc.collect()


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--splits", nargs="+", choices=list(SPLITS), default=["iid", "dirichlet"])
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    numbers = (("clients", 10), ("bad", 3), ("tasks", 4), ("steps", 12), ("batch", 2), ("max_length", 96))
    for name, default in (*numbers, ("examples", 48)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--validation_share", type=float, default=0.2, help="of a client's examples, to judge with")
    parser.add_argument("--test_share", type=float, default=0.25)
    return parsed(parser, given)


def main(given: Sequence[str] | None = None) -> None:
    args = arguments(given)
    run(args, Table(args.output_dir / "attacks.csv", KEY))


if __name__ == "__main__":
    main()
