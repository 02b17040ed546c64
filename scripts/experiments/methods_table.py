"""Every averaging method on real instructions: one round of the same clients' updates, attacked and not.

Ten clients with iid shares of four Natural Instructions tasks, three of them contaminated, and a server with data of
its own. Each seed trains every client once (and the contaminated ones once more on each kind of wrong data); every
method then combines the same updates, and the global adapter is tested on the benign clients' test examples.

python -m scripts.experiments.methods_table --base MODEL --data NATURAL_INSTRUCTIONS/tasks --seeds 3
Rows already in the csv are not made again.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import csv
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from fedlora_hf.aggregation import aggregate
from fedlora_hf.config import FederatedConfig
from fedlora_hf.data.clients import make_clients
from fedlora_hf.data.contaminate import contaminate
from fedlora_hf.data.formats import load_examples
from fedlora_hf.trainer import FederatedTrainer
from fedlora_hf.update import AdapterState, ClientUpdate
from fedlora_hf.util.seeding import derive_seed
from scripts import PROJECT
from scripts.experiments.update_attacks import UPDATE_ATTACKS, Knowledge

TASKS = ("task190_", "task288_", "task586_", "task957_")
CLIENTS, CONTAMINATED, RANK = 10, 3, 8
SERVER = "server"
DATA_ATTACKS = {"shuffled answers": "shuffled", "constant answers": "constant"}
ATTACKS = ("none", *DATA_ATTACKS, "sign flip", "boost x10", "flip and boost", "a little is enough")
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "fedavg": ("fedavg", {}),
    "product_mean": ("product_mean", {}),
    "fedex (rank grows)": ("fedex", {"target_rank": None}),
    "median": ("median", {}),
    "trimmed_mean": ("trimmed_mean", {}),
    "geometric_median": ("geometric_median", {}),
    "multikrum": ("multikrum", {}),
    "bulyan": ("bulyan", {}),
    "norm_clipping": ("norm_clipping", {}),
    "centred_clipping": ("centred_clipping", {}),
    "fltrust": ("fltrust", {}),
    "ties": ("ties", {}),
    "ties, density 0.2": ("ties", {"density": 0.2}),
    "dare, density 0.5": ("dare", {"density": 0.5}),
    "clair, influence=flags": ("clair", {"influence": "flags"}),
    "clair": ("clair", {}),
}
COLUMNS = ("seed", "attack", "rule", "loss", "token_accuracy")


class Federation:
    """One seed's clients, trained on demand and kept in memory."""

    def __init__(self, base: Path, data: Path, seed: int, folder: str) -> None:
        clients = make_clients(
            examples(data),
            partition_by="iid",
            num_clients=CLIENTS + 1,
            validation_fraction=0.1,
            test_fraction=0.1,
            seed=seed,
        )
        names = sorted(clients)
        clients[SERVER] = clients.pop(names.pop())
        rng = np.random.default_rng(derive_seed(seed, "suspects"))
        self.seed, self.names = seed, names
        self.bad = sorted(rng.choice(names, CONTAMINATED, replace=False).tolist())
        for kind in DATA_ATTACKS.values():
            for name in self.bad:
                wrong = contaminate(clients[name]["train"], kind, derive_seed(seed, kind, name))
                clients[f"{kind}-{name}"] = datasets.DatasetDict({**clients[name], "train": wrong})
        args = FederatedConfig(
            output_dir=folder, seed=seed, num_rounds=1, local_steps=16, per_device_train_batch_size=4,
            per_device_eval_batch_size=32, learning_rate=2e-3, lora_r=RANK, lora_alpha=2 * RANK, max_length=160,
            generation_examples=0, report_to="none", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
        self.trainer = FederatedTrainer(model, args, clients, processing_class=AutoTokenizer.from_pretrained(base))
        self.found: dict[str, ClientUpdate] = {}

    def update(self, name: str) -> ClientUpdate:
        """What that client learned in one round from the common start."""
        if name not in self.found:
            self.found[name] = self.trainer.train_client(name, 1)
        return self.found[name]

    def sent(self, attack: str) -> list[ClientUpdate]:
        """What the server gets: every client under its own name."""
        sent = {name: self.update(name).state for name in self.names}
        kind = DATA_ATTACKS.get(attack)
        honest = [sent[name] for name in self.names if name not in self.bad]
        known = Knowledge(self.trainer.initial, honest, derive_seed(self.seed, attack))
        for name in self.bad if attack != "none" else ():
            if kind:
                sent[name] = self.update(f"{kind}-{name}").state
            else:
                sent[name] = UPDATE_ATTACKS[attack](sent[name], known, self.names.index(name))
        return [ClientUpdate(name, state) for name, state in sent.items()]

    def score(self, state: AdapterState) -> tuple[float, float]:
        """(loss in nats a token, token accuracy) on the benign clients' test examples."""
        benign = [self.trainer.clients[name].test for name in self.names if name not in self.bad]
        found = self.trainer.scorer.metrics(state, [row for test in benign for row in test])
        return found["loss"], found["token_accuracy"]


def examples(data: Path) -> datasets.Dataset:
    """110 examples of each task, so that a client gets 40."""
    files = sorted(path for task in TASKS for path in data.glob(f"{task}*.json"))
    parts = [load_examples(path) for path in files]
    return datasets.concatenate_datasets([part.select(range(110)) for part in parts])


def rows_of(federation: Federation, done: set[tuple[str, str, str]], wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of one seed and the rules that are wanted, but for those that are there."""
    for attack in ATTACKS:
        for rule in wanted:
            method, options = RULES[rule]
            if (str(federation.seed), attack, rule) in done:
                continue
            found = aggregate(
                federation.sent(attack),
                method,
                **{"target_rank": RANK, **options},
                server=federation.update(SERVER).state,
            )
            loss, accuracy = federation.score(found.state)
            values = (federation.seed, attack, rule, round(loss, 4), round(accuracy, 4))
            yield dict(zip(COLUMNS, values, strict=True))


def table(file: Path) -> str:
    """The csv as Markdown: the mean loss of each rule and attack, the best of a column bold, and the worst column."""
    with open(file, newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    cells = {
        rule: [
            [float(row["loss"]) for row in rows if row["rule"] == rule and row["attack"] == attack]
            for attack in ATTACKS
        ]
        for rule in RULES
    }
    lines = [f"| | {' | '.join(ATTACKS)} | worst |", "|---" * (len(ATTACKS) + 2) + "|"]
    means = {rule: [statistics.mean(cell) if cell else None for cell in row] for rule, row in cells.items()}
    best = [min((row[k] for row in means.values() if row[k] is not None), default=None) for k in range(len(ATTACKS))]
    for rule, row in means.items():
        shown = [
            "" if v is None else f"**{v:.3f}**" if f"{v:.3f}" == f"{low:.3f}" else f"{v:.3f}"
            for v, low in zip(row, best, strict=True)
        ]
        known = [v for v in row if v is not None]
        lines.append(f"| {rule} | {' | '.join(shown)} | {max(known, default=float('nan')):.3f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--data", type=Path, required=True, help="folder of Natural Instructions task files")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES), help="only these")
    default = PROJECT / "docs" / "results" / "methods" / "methods.csv"
    parser.add_argument("--csv", type=Path, default=default, help="where the rows are, and go")
    args = parser.parse_args(arguments)
    disable_progress_bar()
    done: set[tuple[str, str, str]] = set()
    if args.csv.exists():
        with open(args.csv, newline="", encoding="utf-8") as handle:
            done = {(row["seed"], row["attack"], row["rule"]) for row in csv.DictReader(handle)}
    else:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        args.csv.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    for seed in range(args.seed, args.seed + args.seeds):
        if all((str(seed), attack, rule) in done for attack in ATTACKS for rule in args.rules):
            continue
        with tempfile.TemporaryDirectory() as folder:
            federation = Federation(args.base, args.data, seed, folder)
            for row in rows_of(federation, done, args.rules):
                with open(args.csv, "a", newline="", encoding="utf-8") as handle:
                    csv.DictWriter(handle, COLUMNS, lineterminator="\n").writerow(row)
    print(table(args.csv))


if __name__ == "__main__":
    main()
