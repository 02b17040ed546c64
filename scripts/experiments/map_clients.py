"""The validity map's clients: real data divided in five ways, each client trained once sound and once a contamination.

What is trained is kept as PEFT folders in a cache, one for each (data, split, seed), and never trained twice.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from fedlora_hf.config import FederatedConfig
from fedlora_hf.data.clients import make_clients
from fedlora_hf.data.contaminate import contaminate
from fedlora_hf.data.formats import load_examples
from fedlora_hf.loading import limited, load_base
from fedlora_hf.trainer import FederatedTrainer
from fedlora_hf.util.seeding import derive_seed

# {name: (partition_by, alpha)}, from alike to disjoint.
SPLITS: dict[str, tuple[str, float]] = {
    "iid": ("iid", 1.0),
    "Dirichlet 5": ("dirichlet", 5.0),
    "Dirichlet 0.5": ("dirichlet", 0.5),
    "Dirichlet 0.1": ("dirichlet", 0.1),
    "one each": ("group", 1.0),
}
CLIENTS, SHARES = 16, (0.2, 0.4)


@dataclass(frozen=True)
class Setting:
    """One kind of data on one base model, and how a client trains on it: `steps` of 4 sequences of `max_length` tokens.

    base: folder of the base model, loaded in `dtype`. kinds: contaminations of the data. groups: how many tasks are
    drawn from the data (None: all). pretrained_on: sources that the base was made from; only the half of them that was
    held out then is used.
    """

    name: str
    title: str
    data: Path
    base: Path
    task: str
    target_modules: tuple[str, ...]
    kinds: tuple[str, ...]
    max_length: int = 64
    dtype: str = "float32"
    groups: int | None = None
    pretrained_on: tuple[Path, ...] = ()
    steps: int = 20
    learning_rate: float = 1e-3


# Examples a client: enough for 20 steps of 4 without a repeat, and a dozen to validate on.
EXAMPLES = 120
HELD_OUT = 0.5
# An empty file in a run's folder: every client is trained.
COMPLETE = "complete"


def variant(client: str, kind: str) -> str:
    """The id under which a client's contaminated twin is kept."""
    return f"{client}.{kind}"


def contaminated_pool(ids: list[str], seed: int) -> list[str]:
    """The clients that may be contaminated in a cohort: the most that any cell needs, drawn from the seed."""
    rng = np.random.default_rng(derive_seed(seed, "contaminated"))
    return [ids[place] for place in rng.permutation(len(ids))[: count_bad(SHARES[-1], len(ids))]]


def count_bad(share: float, clients: int) -> int:
    return round(share * clients)


@cache
def _examples(setting: Setting) -> datasets.Dataset:
    """The setting's examples; of data the base was made from, only what was held out then."""
    examples = load_examples(setting.data, task=setting.task)
    if not setting.pretrained_on:
        return examples
    unseen = held_out(setting.pretrained_on, HELD_OUT)
    pairs = zip(examples["prompt"][:], examples["completion"][:], strict=True)
    return examples.select([row for row, pair in enumerate(pairs) if pair in unseen])


@cache
def held_out(sources: tuple[Path, ...], fraction: float) -> frozenset[tuple[str, str]]:
    """(prompt, completion) of what make_base_model.py, with seed 0, holds out of these sources, in their order."""
    pairs: list[tuple[str, str]] = []
    for source in sources:
        examples = load_examples(source)
        pairs += zip(examples["prompt"][:], examples["completion"][:], strict=True)
    order = np.random.default_rng(derive_seed(0, "holdout")).permutation(len(pairs))
    split = round(len(pairs) * fraction)
    return frozenset(pairs[place] for place in order[:split]) - {pairs[place] for place in order[split:]}


def client_data(setting: Setting, split: str, seed: int) -> dict[str, Any]:
    """{client id: splits}: every client sound, and contaminated twins of the pool.

    A twin's validation split is spoiled as its training split is: it judges others by what it was taught.
    """
    examples = _examples(setting)
    if setting.groups is not None:
        names = np.unique(examples["group"][:])
        rng = np.random.default_rng(derive_seed(seed, "groups"))
        chosen = set(rng.choice(names, setting.groups, replace=False).tolist())
        examples = examples.select([row for row, group in enumerate(examples["group"][:]) if group in chosen])
    partition_by, alpha = SPLITS[split]
    clients: dict[str, Any] = dict(
        make_clients(
            examples,
            partition_by=partition_by,
            num_clients=CLIENTS,
            dirichlet_alpha=alpha,
            test_fraction=0.0,
            max_examples_per_client=EXAMPLES,
            seed=seed,
        )
    )
    for client in contaminated_pool(sorted(clients), seed):
        for kind in setting.kinds:
            if partition_by == "group" and kind == "shuffled_labels":
                continue  # a client of one class has nothing to shuffle
            spoil = derive_seed(seed, client)
            clients[variant(client, kind)] = {
                name: contaminate(clients[client][name], kind, spoil) for name in ("train", "validation")
            }
    return clients


def run_folder(setting: Setting, split: str, seed: int, cache_dir: Path) -> Path:
    """Where the updates of one (setting, split, seed) are kept."""
    return cache_dir / setting.name / split.replace(" ", "-") / f"seed-{seed}"


def is_complete(folder: Path) -> bool:
    """Whether every client of a run's folder was trained."""
    return (folder / COMPLETE).exists()


def trainer(setting: Setting, split: str, seed: int, cache_dir: Path) -> FederatedTrainer:
    """A trainer over all clients of one (setting, split, seed); its store lies in the cache."""
    args = FederatedConfig(
        output_dir=str(run_folder(setting, split, seed, cache_dir)),
        task=setting.task,
        model_name_or_path=str(setting.base),
        model_dtype=setting.dtype,
        target_modules=list(setting.target_modules),
        learning_rate=setting.learning_rate,
        lora_r=8,
        lora_alpha=16,
        local_steps=setting.steps,
        per_device_train_batch_size=4,
        max_length=setting.max_length,
        seed=seed,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    classes = _examples(setting).features.get("label")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "head"))  # a classifier's fresh head is drawn as the base is loaded
        model, tokenizer, max_length = load_base(args, classes.names if classes else None)
    return FederatedTrainer(
        model, limited(args, max_length), client_data(setting, split, seed), processing_class=tokenizer
    )


def train_missing(federation: FederatedTrainer) -> Iterator[str]:
    """Train every client that the cache does not hold; the id of each as it is done."""
    for client in federation.clients:
        if federation.store.finished(1, client) is None:
            federation.store.save(1, federation.train_client(client, 1))
            yield client
    (Path(str(federation.args.output_dir)) / COMPLETE).touch()
