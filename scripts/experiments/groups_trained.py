"""What two clients of twelve with another task end with: one global adapter, one for each group, or alone.

Ten clients share some tasks of Natural Instructions (or categories of Dolly), two have another one; two rounds of CLAIR
with --clusters 1 and auto from the same start, and the two by themselves. Tested on each client's own test examples.

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

from fedlora_hf.config import FederatedConfig
from fedlora_hf.data.clients import make_clients
from fedlora_hf.data.formats import load_examples
from fedlora_hf.trainer import FederatedTrainer
from scripts import PROJECT

MANY, FEW = 10, 2
ROUNDS, STEPS, RANK = 2, 6, 8
TASKS, OTHER_TASK = ("task190_", "task288_", "task586_", "task957_"), ("task107_",)
CATEGORIES, OTHER_CATEGORY = ("open_qa", "general_qa", "brainstorming", "creative_writing"), ("classification",)
LONGEST = 400  # characters of a Dolly record that is used
WAYS: dict[str, dict[str, Any]] = {
    "clusters 1": {"aggregation": "clair"},
    "clusters auto": {"aggregation": "clair", "clusters": "auto"},
    "alone": {"aggregation": "local"},
}
COLUMNS = ("setting", "seed", "way", "groups", "few_global", "few_personal", "many_global", "many_personal")
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


def row_of(base: Path, clients: Clients, setting: str, seed: int, way: str, rounds: int) -> dict[str, Any]:
    """One way of one cohort, trained and tested."""
    if way == "alone":
        clients = {name: splits for name, splits in clients.items() if name.startswith("few-")}
    with tempfile.TemporaryDirectory() as folder:
        args = FederatedConfig(
            output_dir=folder, seed=seed, num_rounds=rounds, local_steps=STEPS, per_device_train_batch_size=2,
            per_device_eval_batch_size=16, learning_rate=2e-3, lora_r=RANK, lora_alpha=2 * RANK, max_length=96,
            generation_examples=0, report_to="none", disable_tqdm=True, use_cpu=True, **WAYS[way],
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
        trainer = FederatedTrainer(model, args, clients, processing_class=AutoTokenizer.from_pretrained(base))
        run = trainer.loop.train()
        groups = run.record.rounds[-1].get("groups", {})
        trainer.loop.evaluate()
    told = "; ".join(" ".join(facts["clients"]) for facts in groups.values()) if len(groups) > 1 else ""
    row: dict[str, Any] = {"setting": setting, "seed": seed, "way": way, "groups": told}
    for kind in ("few", "many"):
        for view, column in (("global", "global"), ("personalised", "personal")):
            losses = [
                facts["metrics"][view]["loss"]
                for name, facts in run.record.clients.items()
                if name.startswith(kind) and facts["metrics"].get(view)
            ]
            row[f"{kind}_{column}"] = round(statistics.mean(losses), 4) if losses else ""
    return row


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown: loss of the two and of the ten, means over the seeds, and in how many seeds the groups are right."""
    heads = ("clients", "way", "two: global", "two: personal", "ten: global", "ten: personal", "groups found", "seeds")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for setting, way in dict.fromkeys((row["setting"], row["way"]) for row in rows):
        mine = [row for row in rows if (row["setting"], row["way"]) == (setting, way)]
        cells = []
        for column in COLUMNS[4:]:
            values = [float(row[column]) for row in mine if row[column] != ""]
            cells.append(f"{statistics.mean(values):.2f}" if values else "")
        found = f"{sum(row['groups'] != '' for row in mine)} of {len(mine)}" if way == "clusters auto" else ""
        if way == "alone":  # each has its own adapter, which is no global one
            cells[0] = ""
        lines.append(f"| {setting} | {way} | {' | '.join(cells)} | {found} | {len(mine)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--data", type=Path, required=True, help="folder of the published datasets")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--csv", type=Path, default=PROJECT / "docs" / "results" / "groups" / "trained.csv")
    args = parser.parse_args(arguments)
    disable_progress_bar()
    datasets.disable_progress_bars()
    if not args.csv.exists():
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        args.csv.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    ways = [(where, way) for where in ("natural_instructions", "dolly") for way in WAYS]
    ways += [
        (f"{where}, {by}", "clusters auto")
        for where in ("natural_instructions", "dolly")
        for by in ("iid", "dirichlet")
    ]
    for seed in range(args.seed, args.seed + args.seeds):
        for setting, way in ways:
            with open(args.csv, newline="", encoding="utf-8") as handle:
                done = {(row["setting"], row["seed"], row["way"]) for row in csv.DictReader(handle)}
            if (setting, str(seed), way) not in done:
                # One round tells whether clients of one kind are parted.
                rounds = 1 if "," in setting else ROUNDS
                row = row_of(args.base, cohort(args.data, setting, seed), setting, seed, way, rounds)
                with open(args.csv, "a", newline="", encoding="utf-8") as handle:
                    csv.DictWriter(handle, COLUMNS, lineterminator="\n").writerow(row)
                print(row, flush=True)
    with open(args.csv, newline="", encoding="utf-8") as handle:
        print(table(list(csv.DictReader(handle))))


if __name__ == "__main__":
    main()
