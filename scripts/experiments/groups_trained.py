"""What two clients of twelve with another task end with: one global adapter, one for each group, or alone.

Ten clients share some tasks of Natural Instructions (or categories of Dolly), two have another one. Each seed trains
every client once, one round from the common start; both rules then combine the same updates, tested on each client's
own test examples.

python -m scripts.experiments.groups_trained --base MODEL --data DATA --seeds 3
DATA holds dolly/databricks-dolly-15k.jsonl and natural_instructions/tasks. Rows already in the csv are not made again.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import csv
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from fedlora_hf.aggregation import aggregate
from fedlora_hf.config import FederatedConfig
from fedlora_hf.data.clients import make_clients
from fedlora_hf.data.formats import load_examples
from fedlora_hf.trainer import FederatedTrainer
from fedlora_hf.update import AdapterState
from scripts import PROJECT
from scripts.experiments.groups import by_group

MANY, FEW = 10, 2
STEPS, RANK = 6, 8
TASKS, OTHER_TASK = ("task190_", "task288_", "task586_", "task957_"), ("task107_",)
CATEGORIES, OTHER_CATEGORY = ("open_qa", "general_qa", "brainstorming", "creative_writing"), ("classification",)
LONGEST = 400  # characters of a Dolly record that is used
SETTINGS = ("natural_instructions", "dolly")
# Their own update, the plain mean of all, the one adapter and its refinement (the flagged have none), their group's.
WAYS = ("start", "alone", "mean", "one", "one, personal", "groups", "groups, personal")
COLUMNS = ("setting", "seed", "groups", "flagged", *(f"{who}: {way}" for who in ("two", "ten") for way in WAYS))
Clients = dict[str, Any]


def examples(data: Path, setting: str, names: Sequence[str]) -> datasets.Dataset:
    """Examples of the named tasks, or categories."""
    if setting == "natural_instructions":
        files = sorted((data / "natural_instructions" / "tasks").iterdir())
        return datasets.concatenate_datasets([load_examples(f) for f in files if f.name.startswith(tuple(names))])
    lines = (data / "dolly" / "databricks-dolly-15k.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["category"] in names and len(str(row)) < LONGEST]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "rows.jsonl"
        place.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return load_examples(place).with_format(None)


def shared(rows: datasets.Dataset, count: int, prefix: str, seed: int, by: str = "iid") -> Clients:
    """`count` clients of these examples, 32 for training each."""
    made = make_clients(
        rows, partition_by=by, num_clients=count, validation_fraction=0.1, test_fraction=0.2,
        max_examples_per_client=46, seed=seed,
    )  # fmt: skip
    return {f"{prefix}{place:02d}": splits for place, splits in enumerate(made.values())}


def cohort(data: Path, setting: str, seed: int) -> Clients:
    """Twelve clients: ten "many-", two "few-"; of the settings that end in iid or dirichlet all are "many-"."""
    where, _, by = setting.partition(", ")
    common, other = (TASKS, OTHER_TASK) if where == "natural_instructions" else (CATEGORIES, OTHER_CATEGORY)
    rows = examples(data, where, common)
    if by:
        return shared(rows, MANY + FEW, "many-", seed, by)
    return shared(rows, MANY, "many-", seed) | shared(examples(data, where, other), FEW, "few-", seed)


def row_of(base: Path, clients: Clients, setting: str, seed: int) -> dict[str, Any]:
    """One cohort, trained and tested."""
    with tempfile.TemporaryDirectory() as folder:
        args = FederatedConfig(
            output_dir=folder, seed=seed, num_rounds=1, local_steps=STEPS, per_device_train_batch_size=2,
            per_device_eval_batch_size=16, learning_rate=2e-3, lora_r=RANK, lora_alpha=2 * RANK, max_length=96,
            generation_examples=0, report_to="none", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
        trainer = FederatedTrainer(model, args, clients, processing_class=AutoTokenizer.from_pretrained(base))
        updates = [trainer.train_client(name, 1) for name in sorted(trainer.clients)]
    one, several = aggregate(updates, "clair", target_rank=RANK), by_group(updates, RANK)
    mean = aggregate(updates, "product_mean", target_rank=RANK)
    group_of = {client: group for group in several.groups.values() for client in group.clients}
    losses: dict[str, list[float]] = {}
    for update in updates:
        name, test = update.client_id, trainer.clients[update.client_id].test
        states: dict[str, AdapterState | None] = {"start": trainer.initial, "alone": update.state, "mean": mean.state}
        states |= {"one": one.state, "one, personal": one.personalised.get(name)}
        states |= {"groups": group_of[name].state, "groups, personal": several.personalised.get(name)}
        who = "two" if name.startswith("few-") else "ten"
        for way, state in states.items():
            if state is not None:
                losses.setdefault(f"{who}: {way}", []).append(trainer.scorer.metrics(state, test)["loss"])
    parted = [" ".join(group.clients) for group in several.groups.values()] if len(several.groups) > 1 else []
    row = {"setting": setting, "seed": seed, "groups": "; ".join(parted), "flagged": " ".join(one.flagged)}
    return row | {column: round(statistics.mean(found), 4) for column, found in losses.items()}


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown: losses of the two and of the ten, means over the seeds."""
    lines = ["| clients | of | " + " | ".join(WAYS) + " | parted | seeds |", "|" + "---|" * (len(WAYS) + 4)]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        mine = [row for row in rows if row["setting"] == setting]
        for who in ("two", "ten"):
            cells = []
            for way in WAYS:
                values = [float(row[f"{who}: {way}"]) for row in mine if row[f"{who}: {way}"]]
                cells.append(f"{statistics.mean(values):.2f}" if values else "")
            parted = sum(row["groups"] != "" for row in mine)
            lines.append(f"| {setting} | {who} | {' | '.join(cells)} | {parted} of {len(mine)} | {len(mine)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--data", type=Path, required=True, help="folder of the published datasets")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    every = [f"{where}{by}" for where in SETTINGS for by in ("", ", iid", ", dirichlet")]
    parser.add_argument("--settings", nargs="+", default=SETTINGS, choices=every, help="default: %(default)s")
    parser.add_argument("--csv", type=Path, default=PROJECT / "docs" / "results" / "groups" / "trained.csv")
    args = parser.parse_args(arguments)
    disable_progress_bar()
    datasets.disable_progress_bars()
    if not args.csv.exists():
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with open(args.csv, "w", newline="", encoding="utf-8") as handle:
            csv.DictWriter(handle, COLUMNS, lineterminator="\n").writeheader()
    for seed in range(args.seed, args.seed + args.seeds):
        for setting in args.settings:
            with open(args.csv, newline="", encoding="utf-8") as handle:
                done = {(row["setting"], row["seed"]) for row in csv.DictReader(handle)}
            if (setting, str(seed)) not in done:
                row = row_of(args.base, cohort(args.data, setting, seed), setting, seed)
                with open(args.csv, "a", newline="", encoding="utf-8") as handle:
                    csv.DictWriter(handle, COLUMNS, lineterminator="\n").writerow(row)
                print(row, flush=True)
    with open(args.csv, newline="", encoding="utf-8") as handle:
        print(table(list(csv.DictReader(handle))))


if __name__ == "__main__":
    main()
