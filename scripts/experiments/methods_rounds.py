"""What is put around an average, and averages that need rounds, on real instructions: uneven clients, several rounds.

Five clients with Dirichlet shares (alpha 0.5) of four Natural Instructions tasks, nobody contaminated; every variant
runs the same rounds from the same start, and the global adapter is tested on all clients' test examples.

python -m scripts.experiments.methods_rounds --base MODEL --data NATURAL_INSTRUCTIONS/tasks --seeds 3
Rows already in the csv are not made again.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import csv
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from fedlora_hf.config import FederatedConfig
from fedlora_hf.data.clients import make_clients
from fedlora_hf.trainer import FederatedTrainer
from scripts import PROJECT
from scripts.experiments.methods_table import examples

CLIENTS, ROUNDS, STEPS, RANK = 5, 4, 8, 8
VARIANTS: dict[str, dict[str, Any]] = {
    "fedavg": {"aggregation": "fedavg"},
    "product_mean": {"aggregation": "product_mean"},
    "fedex": {"aggregation": "fedex"},
    "ffa": {"aggregation": "ffa"},
    "rolora": {"aggregation": "rolora"},
    "fedavg, FedProx 0.01": {"aggregation": "fedavg", "fedprox_mu": 0.01},
    "fedavg, SCAFFOLD": {"aggregation": "fedavg", "scaffold": True},
    "fedavg, avgm 0.5": {"aggregation": "fedavg", "server_optimizer": "avgm", "server_momentum": 0.5},
    "product_mean, avgm 0.5": {"aggregation": "product_mean", "server_optimizer": "avgm", "server_momentum": 0.5},
    "fedavg, adam": {"aggregation": "fedavg", "server_optimizer": "adam", "server_learning_rate": 3e-3},
    "product_mean, adam": {"aggregation": "product_mean", "server_optimizer": "adam", "server_learning_rate": 3e-4},
    "clair": {"aggregation": "clair"},
}
COLUMNS = ("seed", "variant", "loss", "token_accuracy", "message_bytes")


def row_of(base: Path, clients: Any, seed: int, variant: str, folder: str) -> dict[str, Any]:
    """One variant of one seed, trained and tested."""
    args = FederatedConfig(
        output_dir=folder, seed=seed, num_rounds=ROUNDS, local_steps=STEPS, per_device_train_batch_size=2,
        per_device_eval_batch_size=32, learning_rate=2e-3, lora_r=RANK, lora_alpha=2 * RANK, max_length=128,
        generation_examples=0, report_to="none", disable_tqdm=True, use_cpu=True, personalise="method",
        **VARIANTS[variant],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    trainer = FederatedTrainer(model, args, clients, processing_class=AutoTokenizer.from_pretrained(base))
    run = trainer.loop.train()
    rows = [row for client in trainer.clients.values() for row in client.test]
    found = trainer.scorer.metrics(run.state, rows)
    sent = sum(max(entry["bytes_up"].values()) for entry in run.record.rounds)
    values = (seed, variant, round(found["loss"], 4), round(found["token_accuracy"], 4), sent)
    return dict(zip(COLUMNS, values, strict=True))


def table(file: Path) -> str:
    """The csv as Markdown: mean loss and accuracy over seeds, their spread, and what a client sends."""
    with open(file, newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    variants = {row["variant"] for row in rows}
    have = {(row["seed"], row["variant"]) for row in rows}
    # Seeds differ more than variants do: only those that all variants in the file have are compared.
    rows = [row for row in rows if all((row["seed"], variant) in have for variant in variants)]
    lines = [
        "| | loss | spread over seeds | token accuracy | sent by a client, kB | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        found = [row for row in rows if row["variant"] == variant]
        if found:
            losses = [float(row["loss"]) for row in found]
            accuracy = statistics.mean(float(row["token_accuracy"]) for row in found)
            sent = statistics.mean(float(row["message_bytes"]) for row in found) / 1000
            spread = max(losses) - min(losses)
            mean = statistics.mean(losses)
            lines.append(f"| {variant} | {mean:.3f} | {spread:.3f} | {accuracy:.3f} | {sent:.0f} | {len(found)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--data", type=Path, required=True, help="folder of Natural Instructions task files")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    default = PROJECT / "docs" / "results" / "methods" / "rounds.csv"
    parser.add_argument("--csv", type=Path, default=default, help="where the rows are, and go")
    args = parser.parse_args(arguments)
    disable_progress_bar()
    datasets.disable_progress_bars()
    if not args.csv.exists():
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        args.csv.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    with open(args.csv, newline="", encoding="utf-8") as handle:
        done = {(row["seed"], row["variant"]) for row in csv.DictReader(handle)}
    for seed in range(args.seed, args.seed + args.seeds):
        clients = make_clients(
            examples(args.data), partition_by="dirichlet", num_clients=CLIENTS, dirichlet_alpha=0.5,
            validation_fraction=0.0, test_fraction=0.1, max_examples_per_client=40, seed=seed,
        )  # fmt: skip
        for variant in VARIANTS:
            if (str(seed), variant) not in done:
                with tempfile.TemporaryDirectory() as folder:
                    row = row_of(args.base, clients, seed, variant, folder)
                with open(args.csv, "a", newline="", encoding="utf-8") as handle:
                    csv.DictWriter(handle, COLUMNS, lineterminator="\n").writerow(row)
    print(table(args.csv))


if __name__ == "__main__":
    main()
