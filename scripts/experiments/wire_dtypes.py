"""What it costs to send updates in fewer bits: the demo's federation over Flower's messages, in three wire_dtypes.

Twelve clients, four of them contaminated, four rounds of twenty steps, as `fedlora demo` has them; the same ClientApp,
ServerApp and messages as between machines, handed over within this process. For every seed, method and wire_dtype: the
bytes of updates and adapters that were sent, up and down, and the benign clients' loss under the global adapter on
their own test lines. With fedavg what rounding lost is carried over to the next round; with clair, which factors its
aggregate anew in every round, it is not.

    python -m scripts.experiments.wire_dtypes --seeds 0 1 2 --csv docs/results/wire/wire.csv

Run again, it goes on where it was.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import csv
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fedlora_hf.commands.demo import NUM_CLIENTS, copying_model, federation, letter_tokenizer
from fedlora_hf.flower import node
from fedlora_hf.flower.federate import FlowerRun
from fedlora_hf.flower.settings import read
from fedlora_hf.record.record import RunRecord
from fedlora_hf.util.progress import Progress
from scripts import PROJECT, common

METHODS, DTYPES = ("fedavg", "clair"), ("float32", "bfloat16", "int8")
KEYS = ("seed", "method", "wire_dtype")


def run(base: Path, clients: dict[str, Any], method: str, dtype: str, seed: int, folder: Path) -> RunRecord:
    """One federation over a grid within this process."""
    sys.path.insert(0, str(PROJECT / "tests" / "flower"))
    from local_grid import LocalGrid

    node._own_clients = lambda items, name: {name: clients[name]}  # type: ignore[assignment]
    config = {
        "model_name_or_path": str(base),
        "output_dir": str(folder),
        "aggregation": method,
        "num_rounds": 4,
        "local_steps": 20,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "lora_r": 8,
        "lora_alpha": 16,
        "target_modules": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        "max_length": 32,
        "seed": seed,
        "min_nodes": NUM_CLIENTS,
        "wire_dtype": dtype,
        "flags": "--use_cpu --generation_examples 0 --per_device_eval_batch_size 64 --disable_tqdm true",
    }
    nodes = {100 + place: {"client_id": name} for place, name in enumerate(sorted(clients))}
    return FlowerRun(LocalGrid(nodes, config), *read(config)).train().record


def measured(record: RunRecord) -> dict[str, object]:
    """Mean kB that a client sent and was sent in all rounds; the benign clients' losses; who was flagged of whom."""
    benign = [facts["metrics"] for client, facts in record.clients.items() if "contaminated" not in client]
    total = {way: sum(sum(entry[way].values()) for entry in record.rounds) for way in ("bytes_up", "bytes_down")}
    row: dict[str, object] = {way: round(count / NUM_CLIENTS / 1000, 1) for way, count in total.items()}
    for kind in ("global", "personalised"):
        row[f"{kind}_loss"] = round(statistics.mean(found[kind]["loss"] for found in benign if kind in found), 5)
    return {**row, "found": sum("contaminated" in client for client in record.flagged), "flagged": len(record.flagged)}


def summary(rows: Iterable[dict[str, Any]]) -> list[dict[str, object]]:
    """Means over seeds, and the loss against float32's of the same seed: mean and range."""
    rows = list(rows)
    exact = {(row["seed"], row["method"]): float(row["global_loss"]) for row in rows if row["wire_dtype"] == "float32"}
    found = []
    for method in METHODS:
        for dtype in DTYPES:
            mine = [row for row in rows if (row["method"], row["wire_dtype"]) == (method, dtype)]
            if not mine:
                continue
            more = [float(row["global_loss"]) - exact[row["seed"], method] for row in mine]
            means = {name: statistics.mean(float(row[name]) for row in mine) for name in ("bytes_up", "bytes_down")}
            loss = statistics.mean(float(row["global_loss"]) for row in mine)
            found.append(
                {
                    "method": method,
                    "wire_dtype": dtype,
                    "seeds": len(mine),
                    "kB up": f"{means['bytes_up']:.0f}",
                    "kB down": f"{means['bytes_down']:.0f}",
                    "loss": f"{loss:.4f}",
                    "against float32": f"{statistics.mean(more):+.4f} ({min(more):+.4f} to {max(more):+.4f})",
                    "found, of 4": f"{statistics.mean(float(row['found']) for row in mine):.1f}",
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--csv", type=Path, required=True)
    args = parser.parse_args()
    from flwr.supercore.task_identity import TaskIdentity

    for name, value in (("_run_id", 1), ("_task_id", 1), ("_node_id", 1)):
        setattr(TaskIdentity, name, value)
    torch.set_num_threads(1)
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    rows = list(csv.DictReader(args.csv.open(encoding="utf-8"))) if args.csv.is_file() else []
    done = {tuple(row[key] for key in KEYS) for row in rows}
    for seed in args.seeds:
        cases = [(m, d) for m in METHODS for d in DTYPES if (str(seed), m, d) not in done]
        with tempfile.TemporaryDirectory() as scratch:
            folder, tokenizer, clients = Path(scratch), letter_tokenizer(), federation(seed)
            if cases:
                copying_model(tokenizer, seed, Progress(False)).save_pretrained(folder / "base")
                tokenizer.save_pretrained(folder / "base")
            for method, dtype in cases:
                record = run(folder / "base", clients, method, dtype, seed, folder / method / dtype)
                rows.append({"seed": str(seed), "method": method, "wire_dtype": dtype, **measured(record)})
                common.write_csv(args.csv, rows)
    print(common.environment(), common.markdown(summary(rows)), sep="\n\n")


if __name__ == "__main__":
    main()
