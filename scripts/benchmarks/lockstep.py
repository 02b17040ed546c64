"""Clients in lockstep beside the same clients one by one, on one trainer, in one run: tokens a second and the ratio.

    OMP_NUM_THREADS=1 python -m scripts.benchmarks.lockstep --csv docs/benchmarks/lockstep.csv

Both ways take turns on the same clients, from the same start; ratios are medians of pairs, above 1 where lockstep is
faster; `cpu_ratio` is that of the processor's time, which does not see what else the machine does. `difference` is the
largest difference between the two ways' factors. Then the same for scoring: as many adapters on one validation split,
one by one and side by side.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from fedlora_hf import FederatedConfig, FederatedTrainer
from fedlora_hf.training.side_scores import losses_of_each
from fedlora_hf.update import ClientUpdate
from fedlora_hf.util.seeding import derive_seed
from scripts import common


class Shape(NamedTuple):
    """A Llama with random weights, and the clients' batches. checkpointing: of activations; half: bfloat16."""

    hidden: int
    layers: int
    heads: int
    vocabulary: int
    batch: int
    tokens: int
    clients: int = 8
    steps: int = 5
    rank: int = 8
    intermediate: int = 0  # 0: twice the hidden size
    key_value_heads: int = 0  # 0: as many as heads
    half: bool = False
    checkpointing: bool = False


def trainer_of(shape: Shape, device: str, folder: str) -> FederatedTrainer:
    """A trainer of as many clients as go at once, each with enough examples of full length for a round's steps."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate or 2 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads or shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=max(shape.tokens, 128),
    )
    with torch.device(device):
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16 if shape.half else default)
        try:
            model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(default)
    args = FederatedConfig(
        output_dir=folder,
        aggregation="fedavg",
        clients_at_once=shape.clients,
        local_steps=shape.steps,
        per_device_train_batch_size=shape.batch,
        per_device_eval_batch_size=shape.batch,
        learning_rate=1e-3,
        lora_r=shape.rank,
        lora_alpha=2 * shape.rank,
        target_modules=["q_proj", "v_proj"],
        bf16=shape.half,
        activation_checkpointing=shape.checkpointing,
        use_cpu=device == "cpu",
        disable_tqdm=True,
        report_to="none",
    )
    clients = {f"client-{number}": examples(shape, number) for number in range(shape.clients)}
    return FederatedTrainer(model, args, clients)


def examples(shape: Shape, number: int) -> dict[str, Dataset]:
    """Random tokens, and two batches of them for validation."""
    generator = torch.Generator().manual_seed(derive_seed(0, "lockstep", number))
    count = shape.batch * shape.steps
    ids = torch.randint(0, shape.vocabulary, (count + 2 * shape.batch, shape.tokens), generator=generator).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    return {"train": rows.select(range(count)), "validation": rows.select(range(count, len(ids)))}


def training(shape: Shape, device: str, repeats: int, **more: Any) -> list[dict[str, Any]]:
    """A row a way: ms for all clients' steps, tokens a second, the ratio to one by one, the largest difference."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(shape, device, folder)
        found: dict[str, dict[str, ClientUpdate]] = {"one by one": {}, "lockstep": {}}

        def one_by_one(_: str) -> None:
            for client in trainer.clients:
                found["one by one"][client] = trainer.train_client(client, 1)

        def lockstep(_: str) -> None:
            def told(client: str, update: ClientUpdate | Exception, moments: bytes) -> None:
                if isinstance(update, Exception):
                    raise update
                found["lockstep"][client] = update

            trainer.train_clients(list(trainer.clients), 1, told)

        rows = both("training", {"one by one": one_by_one, "lockstep": lockstep}, repeats, tokens_of(shape))
        rows[1]["difference"] = f"{largest(found['one by one'], found['lockstep']):.1e}"
        rows += scoring(trainer, shape, repeats, [update.state for update in found["lockstep"].values()])
    sizes = {"hidden": shape.hidden, "batch": shape.batch, "tokens": shape.tokens, "clients": shape.clients}
    return [{**more, **sizes, **row} for row in rows]


def scoring(trainer: FederatedTrainer, shape: Shape, repeats: int, states: list[Any]) -> list[dict[str, Any]]:
    """The same for the losses of as many adapters on one client's validation split."""
    split, scorer = trainer.clients["client-0"].validation, trainer.scorer
    losses: dict[str, list[float]] = {}

    def one_by_one(_: str) -> None:
        losses["one by one"] = [scorer.metrics(state, split)["loss"] for state in states]

    def side_by_side(_: str) -> None:
        losses["lockstep"] = losses_of_each(scorer, states, split)

    tokens = len(states) * 2 * shape.batch * shape.tokens
    rows = both("scoring", {"one by one": one_by_one, "lockstep": side_by_side}, repeats, tokens)
    pairs = zip(losses["one by one"], losses["lockstep"], strict=True)
    rows[1]["difference"] = f"{max(abs(a - b) for a, b in pairs):.1e}"
    return rows


def both(what: str, ways: dict[str, Callable[[str], None]], repeats: int, tokens: int) -> list[dict[str, Any]]:
    for work in ways.values():  # once for what happens once
        work("")
    times = common.in_turns(ways, [""], repeats)
    rows: list[dict[str, Any]] = []
    for way, own in times.items():
        seconds = statistics.median(second.wall for second in own)
        pairs = list(zip(times["one by one"], own, strict=True))
        rows.append(
            {
                "what": what,
                "way": way,
                "ms": round(seconds * 1e3, 1),
                "tokens_s": round(tokens / seconds),
                "ratio": round(statistics.median(alone.wall / second.wall for alone, second in pairs), 2),
                "cpu_ratio": round(statistics.median(alone.cpu / second.cpu for alone, second in pairs), 2),
                "difference": "",
            }
        )
    return rows


def tokens_of(shape: Shape) -> int:
    return shape.clients * shape.steps * shape.batch * shape.tokens


def largest(first: dict[str, ClientUpdate], second: dict[str, ClientUpdate]) -> float:
    """The largest difference between any two numbers of the clients' factors."""
    return max(
        float((getattr(factors, name) - getattr(second[client].state[module], name)).abs().max())
        for client, update in first.items()
        for module, factors in update.state.items()
        for name in "AB"
    )


SHAPES = {
    "1 x 64": Shape(256, 4, 4, 600, batch=1, tokens=64),
    "8 x 128": Shape(256, 4, 4, 600, batch=8, tokens=128, clients=4, steps=2),
}
TINY = {"tiny": Shape(16, 1, 2, 64, batch=2, tokens=8, clients=2, steps=1)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="pairs (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: shows that everything runs")
    parser.add_argument("--csv", type=Path, help="write the rows there as well")
    args = parser.parse_args(arguments)
    logging.set_verbosity_error()
    shapes = TINY if args.tiny else SHAPES
    rows = [row for shape in shapes.values() for row in training(shape, "cpu", args.repeats)]
    print(common.environment())
    print()
    print(common.markdown(rows))
    if args.csv:
        common.write_csv(args.csv, rows)


if __name__ == "__main__":
    main()
