"""Does a long run grow? Memory, open files, threads, disk and run.json, round by round; and a run of many tiny clients.

    python -m scripts.checks.long_run --rounds 200 --clients 4 --csv docs/long_run.csv
    python -m scripts.checks.long_run --rounds 2 --clients 1000 --csv docs/many_clients.csv

A Llama of two layers and hidden size 16, LoRA of rank 2 on q_proj and v_proj, one step of one example a client and
round. Memory is the process's resident set; a figure "per round" is the least-squares slope over the second half.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import csv
import gc
import os
import resource
import shutil
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from fedlora_hf import FederatedConfig, FederatedTrainer
from fedlora_hf.rounds import output

COLUMNS = ("round", "seconds", "rss_mb", "open_files", "threads", "disk_mb", "run_json_kb", "objects")


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, pad_token_id=0, eos_token_id=1, bos_token_id=None, **shape))


def tiny_clients(count: int) -> dict[str, Any]:
    """Clients of two training examples and a test example of ten tokens."""
    clients = {}
    for number in range(count):
        rows = torch.randint(2, 64, (3, 10), generator=torch.Generator().manual_seed(number)).tolist()
        split = datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})
        clients[f"c{number:04d}"] = {"train": split.select([0, 1]), "test": split.select([2])}
    return clients


class Meter(TrainerCallback):
    """Measures after every round."""

    def __init__(self, out: Path, every: int) -> None:
        self.out, self.every, self.began, self.rows = out, every, time.perf_counter(), []

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        number = int(state.epoch)
        if number % self.every and number != 1:
            return
        gc.collect()
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        last = self.out / "rounds" / str(number) / "run.json"
        files = [path.stat().st_size for path in self.out.rglob("*") if path.is_file()]
        self.rows.append(
            {
                "round": number,
                "seconds": round(time.perf_counter() - self.began, 2),
                "rss_mb": round(int(status["VmRSS"].split()[0]) / 1024, 2),
                "open_files": len(os.listdir("/proc/self/fd")),
                "threads": threading.active_count(),
                "disk_mb": round(sum(files) / 1e6, 3),
                "run_json_kb": round(last.stat().st_size / 1e3, 1),
                "objects": len(gc.get_objects()),
            }
        )


def slopes(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Growth a round over the second half of the run."""
    half = rows[len(rows) // 2 :]
    x = [row["round"] for row in half]
    return {name: float(np.polyfit(x, [row[name] for row in half], 1)[0]) for name in COLUMNS[2:]} if len(x) > 1 else {}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--aggregation", default="clair")
    parser.add_argument("--every", type=int, default=1, help="measure every so many rounds")
    parser.add_argument("--output_dir", type=Path, default=Path("long_run_out"))
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args(arguments)
    shutil.rmtree(args.output_dir, ignore_errors=True)
    warnings.filterwarnings("ignore", message="clair stopped")
    output.write_report = lambda record, folder: []  # type: ignore[assignment]  # figures are made once, at the end
    meter = Meter(args.output_dir, args.every)
    config = FederatedConfig(
        output_dir=str(args.output_dir),
        aggregation=args.aggregation,
        num_rounds=args.rounds,
        local_steps=1,
        per_device_train_batch_size=1,
        lora_r=2,
        lora_alpha=4,
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=10**9,
    )
    trainer = FederatedTrainer(tiny_model(), config, tiny_clients(args.clients), callbacks=[meter])
    trainer.train()
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, COLUMNS)
            table.writeheader()
            table.writerows(meter.rows)
    first, last, growth = meter.rows[0], meter.rows[-1], slopes(meter.rows)
    for name in COLUMNS[1:]:
        print(
            f"{name:12} {first[name]:>12} -> {last[name]:>12}", f"{growth[name]:+.4f} a round" if name in growth else ""
        )
    print(f"log_history  {len(trainer.state.log_history)} entries")
    print(f"peak RSS     {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB", file=sys.stdout)
    return {"rows": meter.rows, "growth": growth, "trainer": trainer}


if __name__ == "__main__":
    main()
