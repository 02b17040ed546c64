"""Tensors as whole numbers from -127 to 127 and a scale for each row or column: a quarter of float32's bytes.

The scale is the largest absolute value of the row over 127, in float32; numbers are rounded to the nearest, halves to
even, so the same tensor always gives the same bytes. LoRA's A has a scale a row, its B one a column: one for each of
the rank-one matrices that make up B A. A whole tensor has one a row, one of a single dimension one in all [our choice].
"""
# SPDX-License-Identifier: Apache-2.0

import math

import torch
from flwr.app import Array
from torch import Tensor

from fedlora_hf.errors import UpdateError

LARGEST = 127
# {axis along which scales run: the name of the dtype}; None: a single scale.
_NAMES = {None: "int8", 0: "int8 by rows", 1: "int8 by columns"}
DTYPES = frozenset(_NAMES.values())


def to_int8(tensor: Tensor, axis: int | None, stype: str) -> Array:
    """A tensor in int8, its scales before its numbers. axis: 0, a scale a row; 1, one a column."""
    tensor = tensor.detach().to("cpu", torch.float32)
    axis = None if tensor.ndim < 2 else axis
    across = [place for place in range(tensor.ndim) if place != axis]
    scales = tensor.abs().amax(across, keepdim=True) / LARGEST
    whole = torch.where(scales > 0, tensor / scales, torch.zeros(())).round().clamp(-LARGEST, LARGEST)
    # NaN stays NaN in its scale, where it is looked for.
    numbers = whole.nan_to_num(0.0).to(torch.int8).contiguous()
    data = scales.reshape(-1).numpy().astype("<f4").tobytes() + numbers.numpy().tobytes()
    return Array(_NAMES[axis], tuple(tensor.shape), stype, data)


def from_int8(array: Array, name: str) -> Tensor:
    """The tensor in float32; UpdateError for bytes, scales or numbers that `to_int8` does not make."""
    shape = tuple(array.shape)
    axis = next(axis for axis, dtype in _NAMES.items() if dtype == array.dtype)
    count = 1 if axis is None else shape[axis] if axis < len(shape) else 0
    if len(array.data) != 4 * count + math.prod(shape):
        raise UpdateError(
            f"array {name[:80]!r}: shape {str(shape)[:60]} of {array.dtype} with {len(array.data)} bytes; they must fit"
        )
    held = bytearray(array.data)
    scales = torch.frombuffer(held, dtype=torch.float32, count=count)
    numbers = torch.frombuffer(held, dtype=torch.int8, offset=4 * count).reshape(shape)
    if not (scales.isfinite() & (scales >= 0)).all():
        raise UpdateError(f"array {name[:80]!r}: a scale is not finite (NaN or Inf) or below 0; train it again")
    if (numbers == -128).any():
        raise UpdateError(f"array {name[:80]!r}: holds -128, which no scale is made for; use this package's client")
    along = [-1 if place == axis else 1 for place in range(len(shape))]
    return numbers.float() * scales.reshape(along if axis is not None else [1] * len(shape))
