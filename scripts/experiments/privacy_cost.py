"""What local differential privacy costs: benign accuracy of the demo's federation under clipping and noise.

    python -m scripts.experiments.privacy_cost --output_dir docs/results/privacy --seeds 0 1 2

One base model of the demo's (of the first seed), three federations of its clients, FedAvg, four rounds; every client
clips the change of its trained factors and adds its own noise. Personal adapters are the clients' own last updates.
Noise is drawn from dp_seed, so that the table can be made again; epsilon is what the same run has with a secret.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import csv
import itertools
import shutil
import warnings
from pathlib import Path
from statistics import mean

from transformers import LlamaForCausalLM

from fedlora_hf import FederatedTrainer
from fedlora_hf.commands import demo
from fedlora_hf.config import FederatedConfig
from fedlora_hf.privacy import DELTA, epsilon
from fedlora_hf.rounds import output
from fedlora_hf.util.progress import Progress

COLUMNS = ("method", "clip", "noise_multiplier", "epsilon", "seed", "global_accuracy", "personal_accuracy")
ROUNDS = 4


def cells(clip: float, multipliers: list[float]) -> list[tuple[float | None, float]]:
    """(clip, noise multiplier): without anything, clipped alone, and with noise."""
    return [*((clip, z) for z in multipliers), (None, 0.0)]


def measured(folder: Path, method: str, clip: float | None, multiplier: float, seed: int) -> tuple[float, float]:
    """Mean token accuracy over the benign clients: (global adapter, personal adapters)."""
    usual = demo._config(str(folder / "run"), method, seed)
    changes = {name: getattr(usual, name) for name in ("local_steps", "learning_rate", "lora_r", "lora_alpha")}
    changes |= {name: getattr(usual, name) for name in ("target_modules", "max_length", "seed", "aggregation")}
    if clip is not None:
        changes |= {"dp_clip": clip, "dp_noise_multiplier": multiplier, "dp_seed": seed}
    args = FederatedConfig(
        output_dir=str(folder / "run"),
        num_rounds=ROUNDS,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=64,
        generation_examples=0,
        personalise="method",
        report_to="none",
        disable_tqdm=True,
        **changes,
    )
    model = LlamaForCausalLM.from_pretrained(folder / "base")
    trainer = FederatedTrainer(model, args, demo.federation(seed), processing_class=demo.letter_tokenizer())
    trainer.train()
    record = trainer.run.record
    return demo.benign_accuracy(record, "global"), demo.benign_accuracy(record, "personalised")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=["fedavg"])
    parser.add_argument("--clip", type=float, default=2.0)
    parser.add_argument("--multipliers", type=float, nargs="+", default=[0.1, 0.01, 0.0])
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    output.write_report = lambda record, folder: []  # type: ignore[assignment]
    warnings.filterwarnings("ignore")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    bounds, rows = cells(args.clip, args.multipliers), []
    folder = args.output_dir / "scratch"
    if not (folder / "base").exists():
        base = demo.copying_model(demo.letter_tokenizer(), args.seeds[0], Progress(enabled=False))
        base.save_pretrained(folder / "base")
    for method, (clip, z), seed in itertools.product(args.methods, bounds, args.seeds):
        shutil.rmtree(folder / "run", ignore_errors=True)
        found = measured(folder, method, clip, z, seed)
        told = "" if clip is None else f"{epsilon(z, ROUNDS, DELTA):.3g}"
        rows.append((method, clip, z, told, seed, *(f"{value:.4f}" for value in found)))
        print(*rows[-1], flush=True)
        with open(args.output_dir / "privacy_cost.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
    shutil.rmtree(folder)
    for method, (clip, z) in itertools.product(args.methods, bounds):
        own = [row for row in rows if row[:3] == (method, clip, z)]
        values = " | ".join(f"{mean(float(row[place]) for row in own):.3f}" for place in (5, 6))
        print(f"| {method} | {clip or '-'} | {z if clip else '-'} | {own[0][3] or '-'} | {values} |")


if __name__ == "__main__":
    main()
