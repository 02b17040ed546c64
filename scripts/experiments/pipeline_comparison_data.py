"""Clients of the pipeline's experiments: Dolly by category, Natural Instructions by task; what the base never saw."""
# SPDX-License-Identifier: Apache-2.0

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from fedlora_hf.config import FederatedConfig
from fedlora_hf.data.clients import make_clients
from fedlora_hf.data.formats import load_examples
from fedlora_hf.util.seeding import derive_seed
from scripts.experiments.map_clients import HELD_OUT, held_out


@dataclass(frozen=True)
class Source:
    """One dataset and how it becomes clients. names: only these of its groups (empty: all); groups: so many of them,
    drawn by the seed (None: all). unseen_of: the sources that make_base_model.py made the base of; only what it held
    out of them is used (empty: everything)."""

    name: str
    path: str
    partition_by: str
    groups: int | None = None
    num_clients: int | None = None
    unseen_of: tuple[Path, ...] = ()
    names: tuple[str, ...] = ()

    def clients(self, args: FederatedConfig, seed: int) -> Mapping[str, Any]:
        """{client id: splits}; the sizes of the splits are those of `args`."""
        return _clients(self, args.validation_fraction, args.test_fraction, args.max_examples_per_client, seed)


@cache
def _clients(
    source: Source, validation_fraction: float, test_fraction: float, most: int | None, seed: int
) -> Mapping[str, Any]:
    examples = _examples(source.path, source.unseen_of)
    if source.names:
        places = [row for row, group in enumerate(examples["group"][:]) if group in source.names]
        examples = examples.select(places)
    if source.groups is not None:
        names = np.unique(examples["group"][:])
        rng = np.random.default_rng(derive_seed(seed, "groups"))
        chosen = set(rng.choice(names, min(source.groups, len(names)), replace=False).tolist())
        examples = examples.select([row for row, group in enumerate(examples["group"][:]) if group in chosen])
    return make_clients(
        examples,
        partition_by=source.partition_by,
        num_clients=source.num_clients,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
        max_examples_per_client=most,
        seed=seed,
    )


@cache
def _examples(path: str, unseen_of: tuple[Path, ...]) -> datasets.Dataset:
    examples = load_examples(path)
    if not unseen_of:
        return examples
    unseen = held_out(unseen_of, HELD_OUT)
    pairs = zip(examples["prompt"][:], examples["completion"][:], strict=True)
    return examples.select([row for row, pair in enumerate(pairs) if pair in unseen])


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """--model, --dolly, --natural_instructions, --groups, --held_out_half."""
    parser.add_argument("--model", required=True, help="base model: a folder or a Hub id")
    parser.add_argument("--dolly", help="the .jsonl, or databricks/databricks-dolly-15k; left out: no Dolly")
    parser.add_argument("--categories", nargs="+", default=[], help="only these of Dolly (default: drawn)")
    parser.add_argument("--natural_instructions", help="folder of task files; left out: none")
    parser.add_argument(
        "--groups", type=int, default=8, help="categories, and tasks, drawn by the seed: one client each (default 8)"
    )
    parser.add_argument(
        "--held_out_half",
        action="store_true",
        help="the base was made of these two (in this order) by make_base_model.py --holdout_fraction 0.5: use the "
        "examples it never saw",
    )


def sources(args: argparse.Namespace) -> list[Source]:
    """The datasets that the flags name."""
    given = [path for path in (args.dolly, args.natural_instructions) if path]
    unseen_of = tuple(Path(path) for path in given) if args.held_out_half else ()
    found = []
    if args.dolly:
        names = tuple(args.categories)
        found.append(Source("dolly", args.dolly, "category", args.groups, unseen_of=unseen_of, names=names))
    if args.natural_instructions:
        path = args.natural_instructions
        found.append(Source("natural_instructions", path, "task", args.groups, unseen_of=unseen_of))
    return found
