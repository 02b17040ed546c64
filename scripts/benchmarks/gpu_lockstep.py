"""Clients in lockstep on a GPU, as parts of `scripts.benchmarks.gpu`: a base bound by launches, and a 7B shape."""
# SPDX-License-Identifier: Apache-2.0

import argparse
from typing import Any

from scripts.benchmarks import gpu_parts, lockstep

# The shape of SmolLM2-135M, and of Llama-2-7B; bfloat16, random weights.
SMALL = lockstep.Shape(576, 30, 9, 49152, batch=4, tokens=256, rank=16, intermediate=1536, key_value_heads=3, half=True)
LARGE = lockstep.Shape(
    4096, 32, 32, 32000, batch=1, tokens=512, rank=16, steps=3, intermediate=11008, half=True, checkpointing=True
)


def small(case: argparse.Namespace) -> list[dict[str, Any]]:
    """8 clients of 4 x 256 tokens on the shape of SmolLM2-135M."""
    return _rows(case, SMALL, "SmolLM2-135M shape", repeats=3)


def large(case: argparse.Namespace) -> list[dict[str, Any]]:
    """8 clients of 1 x 512 tokens on a 7B shape, activations checkpointed."""
    return _rows(case, LARGE, "7B shape", repeats=2)


def _rows(case: argparse.Namespace, shape: lockstep.Shape, name: str, repeats: int) -> list[dict[str, Any]]:
    if case.tiny:
        shape = lockstep.TINY["tiny"]._replace(half=shape.half, checkpointing=shape.checkpointing)
    title = f"{name}, {shape.clients} clients, {shape.batch} x {shape.tokens}"
    return [
        gpu_parts.measured(f"{title}: {row['what']} {row['way']}", row["ms"], row["tokens_s"], row["ratio"])
        for row in lockstep.training(shape, case.device, repeats)
    ]
