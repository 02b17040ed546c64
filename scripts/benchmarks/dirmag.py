"""Cost of one training step: plain LoRA, direction/magnitude LoRA (all parts, and each phase) and DoRA, in one run.

    python -m scripts.benchmarks.dirmag --hidden 512 --seq 128

Every repeat times each kind once, in a turning order, on the same batch; the table has medians over the repeats, and
the median of each repeat's own ratio to plain LoRA, which a drift of the machine's speed does not touch.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from fedlora_hf.dirmag import DirectionPhaseConfig, DirMagLoraConfig, MagnitudePhaseConfig

KINDS: dict[str, Callable[..., LoraConfig]] = {
    "lora": LoraConfig,
    "dirmag": DirMagLoraConfig,
    "dirmag, A.direction": DirectionPhaseConfig,
    "dirmag, B.magnitude": MagnitudePhaseConfig,
    "dora": lambda **options: LoraConfig(use_dora=True, **options),
}


def training_step(kind: str, args: argparse.Namespace) -> Callable[[], None]:
    """One step (forward, backward, AdamW) of a fresh Llama with that adapter on every attention projection."""
    torch.manual_seed(0)
    sizes = {"hidden_size": args.hidden, "intermediate_size": 2 * args.hidden, "num_hidden_layers": args.layers}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=8, vocab_size=1024))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(model, KINDS[kind](r=args.rank, target_modules=targets)).to(args.device, args.dtype).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    tokens = torch.randint(0, 1024, (args.batch, args.seq), generator=torch.Generator().manual_seed(1)).to(args.device)

    def step() -> None:
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def milliseconds(step: Callable[[], None], steps: int, device: str) -> float:
    """Mean time of `steps` steps: the process's own on a CPU (neighbours do not count), wall time on a drained GPU."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    for _ in range(steps):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (clock() - start) * 1e3 / steps


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """{kind: median ms a step, median of the paired ratios to lora}."""
    steps = {kind: training_step(kind, args) for kind in KINDS}
    for step in steps.values():
        milliseconds(step, 3, args.device)
    gc.collect()
    gc.freeze()
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    order = list(KINDS)
    for _ in range(args.repeats):
        for kind in order:
            times[kind].append(milliseconds(steps[kind], args.steps, args.device))
        order = order[1:] + order[:1]
    plain = times["lora"]
    return {
        kind: {
            "ms": statistics.median(times[kind]),
            "ratio": statistics.median(own / lora for own, lora in zip(times[kind], plain, strict=True)),
        }
        for kind in KINDS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"hidden": 512, "seq": 128, "batch": 4, "layers": 2, "rank": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=15, help="medians are over these")
    parser.add_argument("--steps", type=int, default=3, help="steps a kind in one repeat")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype)
    result = measure(args)
    if args.json:
        print(json.dumps(result))
        return
    print(f"hidden {args.hidden}, seq {args.seq}, batch {args.batch}, layers {args.layers}, rank {args.rank}")
    for kind, row in result.items():
        print(f"{kind:20s} {row['ms']:9.2f} ms  {row['ratio']:6.3f} x lora")


if __name__ == "__main__":
    main()
