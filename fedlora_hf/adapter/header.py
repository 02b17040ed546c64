"""The header of a safetensors file, read and checked before any value is: names, dtypes, shapes, and where they lie."""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from fedlora_hf.util.disk import open_regular, parse_json_bytes

# An adapter of rank 64 for a model of 70 billion parameters has some 3 GiB; its header some 100 KiB.
MAX_WEIGHTS_BYTES = 8 * 1024**3
MAX_HEADER_BYTES = 16 * 1024**2
# Commas and brackets in a header, eight a tensor: each value costs some hundred bytes once it is read [our choice].
MAX_HEADER_VALUES = 1_000_000
MAX_DIMENSIONS = 8
_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}


class Stored(NamedTuple):
    """One tensor as its file's header tells it: dtype is safetensors' name of it ("F32", "BF16" ...); first: the byte
    of the file that it begins at."""

    dtype: str
    shape: tuple[int, ...]
    first: int = 0


def read_header(path: Path) -> dict[str, Stored]:
    """{name: what it is} of every tensor in a safetensors file, sorted by name; no value is read.

    OSError when the file cannot be opened. ValueError when it is no plain file or larger than MAX_WEIGHTS_BYTES, when
    the header is longer than the file or MAX_HEADER_BYTES, holds more than MAX_HEADER_VALUES values, or when
    dtypes, shapes and offsets do not go together: the tensors must fill the file, without a gap or an overlap.
    """
    with open_regular(path, MAX_WEIGHTS_BYTES) as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError("its header is longer than the file")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"its header says it has {length} bytes, more than {MAX_HEADER_BYTES}")
        header = parse_json_bytes(file.read(length), MAX_HEADER_VALUES)
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    places: dict[str, tuple[int, int]] = {}
    found: dict[str, Stored] = {}
    for name in sorted(set(header) - {"__metadata__"}):
        found[name], places[name] = _entry(name, header[name])
    end = 0
    for start, stop in sorted(places.values()):
        if start != end:
            raise ValueError("its tensors do not fill the file")
        end = stop
    if end != size - 8 - length:
        raise ValueError("its tensors do not fill the file")
    return {name: entry._replace(first=8 + length + places[name][0]) for name, entry in found.items()}


def _entry(name: str, entry: Any) -> tuple[Stored, tuple[int, int]]:
    """What one entry of a header says, and the bytes from and to which it lies."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"{name[:80]!r} is no tensor")
    dtype, shape, place = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BYTES:
        raise ValueError(f"{name[:80]} has dtype {str(dtype)[:20]}, not one of {', '.join(_BYTES)}")
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS or not _counts(place) or len(place) != 2:
        raise ValueError(f"{name[:80]} has no shape or no place in the file")
    if math.prod(shape) * _BYTES[dtype] != place[1] - place[0]:
        raise ValueError(f"{name[:80]}: shape {str(shape)[:60]} of {dtype} does not fit into its place in the file")
    return Stored(dtype, tuple(shape)), (place[0], place[1])


def _counts(value: object) -> TypeGuard[list[int]]:
    """Whether it is a list of whole numbers, none below 0."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
