"""Adapters as anybody's ClientApp sends them: an ArrayRecord of what PEFT's get_peft_model_state_dict gives."""
# SPDX-License-Identifier: Apache-2.0

import io
import math
import re
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from numpy.lib import format as npy
from torch import Tensor

from fedlora_hf.errors import UpdateError
from fedlora_hf.flower.wire import MAX_DIMENSIONS, STYPE, in_rank, to_tensor
from fedlora_hf.update import AdapterState, LoraFactors

PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


@dataclass(frozen=True)
class Scaling:
    """How a LoRA adapter is scaled: `lora_alpha / r`, or `lora_alpha / sqrt(r)` with use_rslora, r being its rank."""

    lora_alpha: float
    use_rslora: bool = False

    def scale(self, rank: int) -> float:
        return self.lora_alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_arrays(arrays: ArrayRecord, scaling: Scaling) -> AdapterState:
    """The adapter in a record; UpdateError, one line, for anything that is not plain LoRA."""
    found: dict[str, dict[str, Tensor]] = {}
    extras: dict[str, Tensor] = {}
    for key, array in arrays.items():
        tensor, match = _tensor(array, key), _FACTOR.fullmatch(key)
        if match:
            found.setdefault(match["module"].removeprefix(PREFIX), {})[match["factor"]] = tensor
        elif "lora_" in key:
            raise UpdateError(f"array {key[:80]!r}: only lora_A.weight and lora_B.weight are LoRA here; use plain LoRA")
        else:
            extras[key] = tensor
    state = {}
    for module, both in found.items():
        if set(both) != {"A", "B"}:
            raise UpdateError(f"module {module[:80]!r}: needs lora_A.weight and lora_B.weight; send the whole adapter")
        if not both["A"].shape[0]:
            raise UpdateError(f"module {module[:80]!r}: has rank 0; send the adapter that was trained")
        state[module] = LoraFactors(both["A"], both["B"], scaling.scale(both["A"].shape[0]))
    return AdapterState(state, extras)


def write_arrays(state: AdapterState, like: ArrayRecord, start: AdapterState) -> ArrayRecord:
    """`state` as a record with the keys, ranks and floats of `like`, which `start` was read from."""
    written = ArrayRecord()
    for key, array in like.items():
        match = _FACTOR.fullmatch(key)
        if match:
            module = match["module"].removeprefix(PREFIX)
            factors = in_rank(state[module], start[module].rank, start[module].scale)
            tensor = getattr(factors, match["factor"])
        else:
            tensor = state.extras[key]
        written[key] = Array(np.ascontiguousarray(tensor.float().numpy().astype(_numpy_dtype(array))))
    return written


def _numpy_dtype(array: Array) -> np.dtype:
    """The float of an array; float32 for one that numpy lacks (bfloat16)."""
    try:
        return np.dtype(array.dtype)
    except TypeError:
        return np.dtype("float32")


def _tensor(array: Array, key: str) -> Tensor:
    """A record's array as a tensor. Its header is read first: a few bytes may claim any size, and allocate it."""
    if array.stype == STYPE:
        return to_tensor(array, key)
    try:
        file = io.BytesIO(array.data)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(file)]
        shape, columns_first, dtype = read(file)
    except (ValueError, KeyError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise UpdateError(f"array {key[:80]!r}: is no NumPy array; send what ArrayRecord(state_dict) makes") from None
    there = len(array.data) - file.tell()
    sound = dtype.kind == "f" and dtype.itemsize in (2, 4, 8) and dtype.isnative and len(shape) <= MAX_DIMENSIONS
    if not sound or math.prod(shape) * dtype.itemsize != there:
        raise UpdateError(f"array {key[:80]!r}: {there} bytes are no {str(shape)[:60]} of {dtype}; send floats, whole")
    flat = np.frombuffer(array.data, dtype, offset=file.tell()).copy()
    return torch.from_numpy(flat.reshape(shape, order="F" if columns_first else "C")).contiguous()
