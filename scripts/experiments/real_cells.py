"""What the experiments on real bases share: clients, one trainer a cell, scores per client, rows in a csv."""
# SPDX-License-Identifier: Apache-2.0

import argparse
import csv
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers.utils.logging import disable_progress_bar

from fedlora_hf.config import FederatedConfig
from fedlora_hf.data.clients import make_clients
from fedlora_hf.data.formats import load_examples
from fedlora_hf.flags import parse
from fedlora_hf.loading import limited, load_base
from fedlora_hf.trainer import FederatedTrainer
from fedlora_hf.training.answers import answer_metrics
from fedlora_hf.training.metrics import generate_answers
from fedlora_hf.update import AdapterState
from fedlora_hf.util.seeding import derive_seed
from scripts.experiments.pipeline_comparison import Measured

Row = dict[str, Any]
DOLLY, INSTRUCTIONS = "dolly/databricks-dolly-15k.jsonl", "natural_instructions"


@dataclass(frozen=True)
class Clients:
    """How clients are made. groups: so many categories or tasks, drawn by the seed (None: all)."""

    name: str
    file: str
    partition_by: str
    groups: int | None = None
    num_clients: int | None = None

    def of(self, data: Path, seed: int, most: int, validation: float = 0.2, test: float = 0.3) -> dict[str, Any]:
        """{client id: splits} with at most `most` examples a client."""
        examples = _examples(str(data / self.file))
        names = np.unique(examples["group"][:])
        if self.groups is not None and self.groups < len(names):
            rng = np.random.default_rng(derive_seed(seed, "groups"))
            chosen = set(rng.choice(names, self.groups, replace=False).tolist())
            examples = examples.select([row for row, group in enumerate(examples["group"][:]) if group in chosen])
        return make_clients(
            examples,
            partition_by=self.partition_by,
            num_clients=self.num_clients,
            validation_fraction=validation,
            test_fraction=test,
            max_examples_per_client=most,
            seed=seed,
        )


SOURCES = {
    "dolly": Clients("dolly", DOLLY, "category", groups=6),
    "tasks": Clients("tasks", INSTRUCTIONS, "task", groups=6),
    "mixtures": Clients("mixtures", INSTRUCTIONS, "dirichlet", groups=6, num_clients=6),
}


@cache
def _examples(path: str) -> datasets.Dataset:
    disable_progress_bar()
    datasets.disable_progress_bars()
    return load_examples(path)


def options(model: Path, folder: Path, seed: int, flags: Sequence[str]) -> FederatedConfig:
    """The options of one cell; `flags` win."""
    fixed = ["--generation_examples", "0", "--disable_tqdm", "true", "--report_to", "none", "--lora_r", "8"]
    fixed += ["--lora_alpha", "16", "--per_device_eval_batch_size", "32", "--personalise", "method"]
    fixed += ["--model_name_or_path", str(model), "--seed", str(seed), "--output_dir", str(folder)]
    return parse([*fixed, *flags])


def trainer_of(args: FederatedConfig, clients: Mapping[str, Any], kind: type[FederatedTrainer] = Measured) -> Any:
    """A trainer in an emptied folder, which scores and writes nothing by itself."""
    model, tokenizer, max_length = load_base(args, None)
    args = limited(args, max_length)
    shutil.rmtree(args.output_dir, ignore_errors=True)
    return kind(model, args, clients, processing_class=tokenizer)


def scores(trainer: Any, client: str, state: AdapterState, split: str) -> dict[str, float]:
    """Loss and token accuracy of an adapter on one client's split, rounded."""
    found = trainer.scorer.metrics(state, getattr(trainer.clients[client], split))
    return {name: round(found[name], 5) for name in ("loss", "token_accuracy")}


def answers(trainer: Any, client: str, state: AdapterState, raw: datasets.Dataset, new: int) -> dict[str, float]:
    """Exact match and ROUGE-L of greedy answers to a client's test examples."""
    from fedlora_hf.data.prepare import wording_of
    from fedlora_hf.data.tokenize import question_ids

    tokenizer, args = trainer.processing_class, trainer.args
    ids = question_ids(raw, tokenizer, max_length=args.max_length, wording=wording_of(args, tokenizer))
    trainer.scorer.install(state)
    said = generate_answers(trainer.slot.model, ids, tokenizer, max_new_tokens=new, batch_size=20)
    return {name: round(value, 5) for name, value in answer_metrics(said, raw["references"][:]).items()}


class Table:
    """A csv that rows are added to; a cell that is in it is not run again. key: the columns that name a cell."""

    def __init__(self, path: Path, key: Sequence[str]) -> None:
        self.path, self.key = path, tuple(key)
        self.rows: list[Row] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as handle:
                self.rows = list(csv.DictReader(handle))
        self.done = {self._of(row) for row in self.rows}

    def _of(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in self.key)

    def has(self, **cell: Any) -> bool:
        return self._of(cell) in self.done

    def take(self, other: Path) -> int:
        """Add the cells of another csv of the same columns that are not here; how many rows."""
        rows = [row for row in Table(other, self.key).rows if self._of(row) not in self.done]
        if rows:
            self.add(rows)
        return len(rows)

    def add(self, rows: Sequence[Row]) -> None:
        """All rows of a finished cell at once."""
        fresh = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
            if fresh:
                writer.writeheader()
            writer.writerows(rows)
        self.rows += [{name: str(value) for name, value in row.items()} for row in rows]
        self.done |= {self._of(row) for row in rows}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """--base, --base_name, --data, --seeds, --tuning_seeds, --cache, --output_dir, --quick."""
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--base_name", help="its name in the tables (default: the folder's)")
    parser.add_argument("--data", type=Path, required=True, help="holds dolly/ and natural_instructions/")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="reported")
    parser.add_argument("--tuning_seeds", nargs="+", type=int, default=[100], help="never reported")
    parser.add_argument("--cache", type=Path, default=Path("results_cache/real"), help="folder for the run in progress")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the csv and the tables")
    parser.add_argument("--quick", action="store_true", help="one seed and few cells: a complete, if noisy, table")


def parsed(parser: argparse.ArgumentParser, given: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; `more` is what the parser does not know: flags of `fedlora train`, for every cell."""
    args, args.more = parser.parse_known_args(given)
    args.base_name = args.base_name or args.base.name
    return args


def each(args: argparse.Namespace) -> Iterator[tuple[bool, int]]:
    """(whether it is for tuning, seed); in quick runs one of each."""
    yield from ((True, seed) for seed in args.tuning_seeds[: 1 if args.quick else None])
    yield from ((False, seed) for seed in args.seeds[: 1 if args.quick else None])
