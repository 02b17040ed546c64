"""What reading and packing cost: a million records read and divided, and tokens a second packed against padded.

    python -m scripts.benchmarks.data records [--count 1000000]
    python -m scripts.benchmarks.data packing --model MODEL --data databricks-dolly-15k.jsonl [--steps 6]

`records` writes so many Dolly records of 500 characters to a temporary folder, reads them with `load_examples` and
divides them by category with `make_clients`; it prints seconds, and the most memory the process has held. `packing`
trains the same short examples of a data set (at most a quarter of --max_length) with and without --packing, with one
adapter of rank 8, and prints tokens that are not padding, a second. One thread; everything is drawn from --seed.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import json
import random
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fedlora_hf.data.clients import make_clients
from fedlora_hf.data.collate import Collator
from fedlora_hf.data.formats import load_examples
from fedlora_hf.data.packing import PackedRows
from fedlora_hf.data.rows import TokenRows
from fedlora_hf.data.tokenize import tokenize_examples


def write_records(path: Path, count: int, seed: int) -> None:
    """`count` distinct records in Dolly's schema, of about 500 characters each, in 20 categories."""
    rng = random.Random(seed)
    words = [f"w{number}" for number in range(5000)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            text = " ".join(rng.choices(words, k=90))
            record = {"instruction": f"{number} {text[:370]}", "response": text[370:490], "category": f"c{number % 20}"}
            file.write(json.dumps(record) + "\n")


def records(count: int, seed: int) -> dict[str, float]:
    """Seconds to read and to divide, and the most memory held, in GiB."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        write_records(path, count, seed)
        began = time.perf_counter()
        examples = load_examples(path)
        read = time.perf_counter()
        clients = make_clients(examples, partition_by="category", seed=seed)
        divided = time.perf_counter()
    assert sum(len(split) for splits in clients.values() for split in splits.values()) == count
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    return {"records": count, "read s": read - began, "divide s": divided - read, "peak GiB": peak}


def packing(model_name: str, data: str, *, steps: int, batch: int, max_length: int, seed: int) -> dict[str, float]:
    """Tokens a second (padding not counted) of training steps, padded and packed, and how many examples a step has."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    base = AutoModelForCausalLM.from_pretrained(model_name, dtype="float32")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]))
    tokens = tokenize_examples(load_examples(data), tokenizer, max_length=max_length)
    short = [place for place, ids in enumerate(tokens["input_ids"][:]) if len(ids) <= max_length // 4]
    rows = TokenRows(tokens.select(short[: 40 * batch * steps]))
    collate = Collator(tokenizer.pad_token_id or tokenizer.eos_token_id)
    together = PackedRows(rows, max_length)
    found = {"padded tokens/s": _speed(model, rows, collate, 4 * batch, steps)}
    found["packed tokens/s"] = _speed(model, together, collate, batch, steps)
    found["ratio"] = found["packed tokens/s"] / found["padded tokens/s"]
    found["examples a packed row"] = len(rows) / len(together)
    return found


def _speed(model: Any, rows: Any, collate: Collator, batch: int, steps: int) -> float:
    """Tokens a second of `steps` steps after one that does not count; rows are taken in an order drawn anew."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    total, began = 0, 0.0
    for step in range(steps + 1):
        if step == 1:
            total, began = 0, time.perf_counter()
        chosen = [rows[order[(step * batch + place) % len(order)]] for place in range(batch)]
        model(**collate(chosen)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += sum(len(row["input_ids"]) for row in chosen)
    return total / (time.perf_counter() - began)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("what", choices=("records", "packing"))
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4, help="packed rows a step; four times as many padded examples")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.what == "records":
        found = records(args.count, args.seed)
    else:
        options = {"steps": args.steps, "batch": args.batch, "max_length": args.max_length, "seed": args.seed}
        found = packing(args.model, args.data, **options)
    for name, value in found.items():
        print(f"{name}: {value:.4g}")


if __name__ == "__main__":
    main()
