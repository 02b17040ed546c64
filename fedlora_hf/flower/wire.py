"""Adapters in Flower's records: tensors travel as their own bits, whatever float they are, and scales beside them.

A state named "start" is two records: `start.arrays` with "A:<module>", "B:<module>" and "X:<whole tensor>", and
`start.scales` {module: scale}. An array's dtype is torch's name of it, so bfloat16, which numpy lacks, travels too.
"""
# SPDX-License-Identifier: Apache-2.0

import math

import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from torch import Tensor

from fedlora_hf.errors import UpdateError
from fedlora_hf.update import AdapterState, LoraFactors

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
STYPE = "fedlora.bits"
MAX_DIMENSIONS = 4


def put(content: RecordDict, name: str, state: AdapterState, dtype: torch.dtype | None = None) -> int:
    """Add a state to a message under `name`, its tensors in `dtype` (None: their own); the bytes of its tensors."""
    arrays = ArrayRecord()
    for module, factors in state.items():
        arrays[f"A:{module}"] = to_array(factors.A, dtype)
        arrays[f"B:{module}"] = to_array(factors.B, dtype)
    for extra, tensor in state.extras.items():
        arrays[f"X:{extra}"] = to_array(tensor, dtype)
    content[f"{name}.arrays"] = arrays
    content[f"{name}.scales"] = MetricRecord({module: float(factors.scale) for module, factors in state.items()})
    return sum(len(array.data) for array in arrays.values())


def holds(content: RecordDict, name: str) -> bool:
    """Whether a message has a state of that name."""
    return f"{name}.arrays" in content


def take(content: RecordDict, name: str) -> AdapterState:
    """The state of that name in a message; UpdateError, one line, for anything that is not one."""
    arrays, scales = content.get(f"{name}.arrays"), content.get(f"{name}.scales")
    if not isinstance(arrays, ArrayRecord) or not isinstance(scales, MetricRecord):
        raise UpdateError(f"message without {name!r}: needs {name}.arrays and {name}.scales; use this package's client")
    tensors: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}, "X": {}}
    for key, array in arrays.items():
        kind, _, module = key.partition(":")
        if kind not in tensors or not module:
            raise UpdateError(f"array {key[:80]!r}: must be A:, B: or X: and a name; use this package's client")
        tensors[kind][module] = to_tensor(array, key)
    if not set(tensors["A"]) == set(tensors["B"]) == set(scales):
        odd = sorted(set(tensors["A"]) ^ set(tensors["B"]) or set(tensors["A"]) ^ set(scales))[0]
        raise UpdateError(f"module {odd[:80]!r}: needs A, B and a scale; use this package's client")
    factors = {
        module: LoraFactors(A, tensors["B"][module], _scale(scales, module)) for module, A in tensors["A"].items()
    }
    return AdapterState(factors, tensors["X"])


def to_array(tensor: Tensor, dtype: torch.dtype | None = None) -> Array:
    """A tensor as bits, dtype and shape."""
    tensor = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
    bits = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return Array(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), STYPE, bits)


def to_tensor(array: Array, name: str) -> Tensor:
    """The tensor again, to the bit; UpdateError when dtype, shape and number of bytes do not go together."""
    dtype, shape = DTYPES.get(array.dtype), tuple(array.shape)
    if dtype is None or array.stype != STYPE:
        raise UpdateError(
            f"array {name[:80]!r}: is {array.dtype[:20]!r} as {array.stype[:20]!r}; must be one of {', '.join(DTYPES)} "
            f"as {STYPE!r}; use this package's client"
        )
    sound = 0 < len(shape) <= MAX_DIMENSIONS and all(type(size) is int and size > 0 for size in shape)
    if not sound or math.prod(shape) * dtype.itemsize != len(array.data):
        raise UpdateError(
            f"array {name[:80]!r}: shape {str(shape)[:60]} of {array.dtype} with {len(array.data)} bytes; they must fit"
        )
    return torch.frombuffer(bytearray(array.data), dtype=dtype).reshape(shape)


def _scale(scales: MetricRecord, module: str) -> float:
    value = scales[module]
    if isinstance(value, list):
        raise UpdateError(f"scale of {module[:80]!r}: is a list; must be a number; use this package's client")
    return float(value)
