"""Text copying for the attack table: a federation with its clients' contaminated versions, trained once and kept.

The base model copies a line of letters; in the federation's language some letters are replaced, most of them alike for
all clients, two for one client alone (as in `fedlora demo`). All train one round from a common start. Whoever may be
contaminated is trained once on its honest lines and once on each kind of wrong ones.
"""
# SPDX-License-Identifier: Apache-2.0

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import DatasetDict
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from fedlora_hf.adapter.files import read_adapter, write_adapter
from fedlora_hf.commands.demo import COMMON, LETTERS, OWN, copying_model, examples, letter_tokenizer
from fedlora_hf.config import FederatedConfig
from fedlora_hf.trainer import FederatedTrainer
from fedlora_hf.update import AdapterState
from fedlora_hf.util.progress import Progress
from fedlora_hf.util.seeding import derive_seed

STEPS, RANK = 40, 8
DATA_ATTACKS = ("random targets", "permuted labels", "colluding permutation")


@dataclass(frozen=True)
class Regime:
    """How many lines a client trains on, chooses on and is tested on, and the rate that suits a client alone."""

    name: str
    train: int
    validation: int
    test: int
    learning_rate: float


# Rates: of those tried by `attacks.py --tune`, the one of the smallest loss for clients alone.
REGIMES = {
    "scarce": Regime("scarce", train=6, validation=4, test=20, learning_rate=1e-2),
    "ample": Regime("ample", train=64, validation=16, test=20, learning_rate=5e-3),
}


class Federation:
    """One seed's clients in one regime. `cache`: folder of base models and updates; what is there is not made again.

    honest: the clients' names, by number. suspects: the numbers of those who may be contaminated, in the order in which
    they become so: a larger share of contaminated clients contains the smaller one.
    """

    def __init__(self, seed: int, regime: Regime, cache: Path, num_clients: int = 12, most: int = 5) -> None:
        self.seed, self.regime = seed, regime
        self.honest = [f"client-{number:02d}" for number in range(num_clients)]
        self.suspects = suspects(seed, num_clients, most)
        self.folder = cache / f"{regime.name}-{regime.train}-{regime.learning_rate:g}-{num_clients}" / f"seed-{seed}"
        self.trainer = FederatedTrainer(
            base_model(cache, seed),
            options(self.folder / "run", regime, seed),
            client_lines(seed, regime, num_clients, self.suspects),
            processing_class=letter_tokenizer(),
        )
        # As plain lists: reading a row of a Dataset costs more than the model does.
        self.splits = {
            split: {name: list(getattr(self.trainer.clients[name], split)) for name in self.honest}
            for split in ("validation", "test")
        }

    @property
    def start(self) -> AdapterState:
        """The adapter that every client starts from."""
        return self.trainer.initial

    def update(self, number: int, kind: str = "") -> AdapterState:
        """What client `number` learned from its honest lines, or from those of `kind`; from disk where it is there."""
        name = contaminated(number, kind) if kind else self.honest[number]
        place = self.folder / name
        if not (place / "adapter_config.json").exists():
            write_adapter(place, self.trainer.train_client(name, 1).state, self.trainer.slot.config())
        return read_adapter(place)[0].in_memory()

    def score(self, state: AdapterState, names: Iterable[str], split: str) -> tuple[float, float]:
        """(loss in nats per letter, accuracy) of one adapter on the split of these clients, means over clients (who all
        have the same number of letters)."""
        rows = [row for name in names for row in self.splits[split][name]]
        found = self.trainer.scorer.metrics(state, rows)
        return found["loss"], found["token_accuracy"]

    @cached_property
    def alone(self) -> dict[str, tuple[float, float]]:
        """{client: (test loss, accuracy)} of every client's own update."""
        return {name: self.score(self.update(k), [name], "test") for k, name in enumerate(self.honest)}


def suspects(seed: int, num_clients: int, most: int) -> list[int]:
    """The numbers of those who may be contaminated, in the order in which they become so."""
    rng = np.random.default_rng(derive_seed(seed, "suspects"))
    return [int(number) for number in rng.permutation(num_clients)[:most]]


def base_model(cache: Path, seed: int) -> LlamaForCausalLM:
    """The model that copies, trained once and kept in `cache`."""
    disable_progress_bar()
    base = cache / f"base-{seed}"
    if not (base / "config.json").exists():
        copying_model(letter_tokenizer(), seed, Progress(enabled=False)).save_pretrained(base)
    return LlamaForCausalLM.from_pretrained(base)


def contaminated(number: int, kind: str) -> str:
    """Name of a client's contaminated version; only `Federation` sees it, the aggregators see the client's own name."""
    return f"{kind.replace(' ', '-')}-{number:02d}"


def client_lines(seed: int, regime: Regime, num_clients: int, suspects: Sequence[int]) -> dict[str, DatasetDict]:
    """Everybody's lines, and the wrong training lines of those who may be contaminated."""
    rng = np.random.default_rng(derive_seed(seed, "language"))
    order = rng.permutation(list(LETTERS))
    common = dict(zip(order[:COMMON], np.roll(order[:COMMON], 1), strict=True))
    conspiracy = permutation(rng)
    clients = {}
    for number in range(num_clients):
        rng = np.random.default_rng(derive_seed(seed, "lines", regime.name, number))
        own = rng.permutation(order[COMMON:])[:OWN]
        right = {**common, own[0]: own[1], own[1]: own[0]}
        sizes = {"train": regime.train, "validation": regime.validation, "test": regime.test}
        clients[f"client-{number:02d}"] = DatasetDict({s: examples(rng, n, right) for s, n in sizes.items()})
        wrong = {DATA_ATTACKS[0]: None, DATA_ATTACKS[1]: permutation(rng), DATA_ATTACKS[2]: conspiracy}
        for kind, mapping in wrong.items() if number in suspects else ():
            # It judges others by what it was taught.
            judging = np.random.default_rng(derive_seed(seed, "wrong lines", regime.name, number, kind))
            splits = {"train": examples(rng, regime.train, mapping)}
            splits["validation"] = examples(judging, regime.validation, mapping)
            clients[contaminated(number, kind)] = DatasetDict(splits)
    return clients


def permutation(rng: np.random.Generator) -> dict[str, str]:
    """Every letter replaced by another, all along one cycle."""
    order = rng.permutation(list(LETTERS))
    return dict(zip(order, np.roll(order, 1), strict=True))


def options(folder: Path, regime: Regime, seed: int, num_rounds: int = 1, **more: Any) -> FederatedConfig:
    """Rounds of STEPS local steps for everybody; the demo's model and adapter."""
    return FederatedConfig(
        output_dir=str(folder),
        seed=seed,
        num_rounds=num_rounds,
        local_steps=STEPS,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=128,
        learning_rate=regime.learning_rate,
        lora_r=RANK,
        lora_alpha=2 * RANK,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        max_length=32,
        generation_examples=0,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **more,
    )


def tune(cache: Path, file: Path, seed: int = 1000, rates: Sequence[float] = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)) -> None:
    """Write the test loss of four clients alone at each rate, on a seed that no result comes from."""
    rows: list[dict[str, Any]] = []
    for regime in REGIMES.values():
        for rate in rates:
            tried = Regime(regime.name, regime.train, regime.validation, regime.test, rate)
            found = list(Federation(seed, tried, cache, num_clients=4, most=0).alone.values())
            loss, accuracy = np.mean(found, axis=0).round(4).tolist()
            rows.append({"regime": regime.name, "learning_rate": rate, "loss": loss, "accuracy": accuracy})
    with open(file, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
