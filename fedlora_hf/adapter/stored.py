"""One safetensors file whose header is read once; its tensors are read when asked for, each with one seek."""
# SPDX-License-Identifier: Apache-2.0

import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from fedlora_hf.adapter.header import Stored, read_header

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


class StoredFile:
    """`entries`: {name: what it is and where}. The file is open only while it is read, so that a thousand clients need
    no thousand files; no header is parsed again, unless the file is another one than before."""

    __slots__ = ("_seen", "entries", "path")

    def __init__(self, path: Path) -> None:
        """ValueError or OSError of `read_header`; ValueError too for a dtype that no adapter has."""
        self.path = path
        self._seen = _identity(os.stat(path))
        self.entries: Mapping[str, Stored] = read_header(path)
        odd = [(name, entry.dtype) for name, entry in self.entries.items() if entry.dtype not in DTYPES]
        if odd:
            raise ValueError(f"{odd[0][0]} has dtype {odd[0][1]}, not one of {', '.join(DTYPES)}")

    def tensors(self, *names: str) -> list[Tensor]:
        """The tensors of those names, in memory. OSError where the file cannot be read, ValueError where it has become
        another one, with other tensors."""
        with open(self.path, "rb", buffering=0) as file:
            seen = _identity(os.fstat(file.fileno()))
            if seen != self._seen:
                if read_header(self.path) != self.entries:
                    raise ValueError("it has changed while it was read")
                self._seen = seen
            return [_read(file, self.entries[name]) for name in names]


def _identity(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _read(file: BinaryIO, entry: Stored) -> Tensor:
    dtype, count = DTYPES[entry.dtype], prod(entry.shape)
    if not count:
        return torch.empty(entry.shape, dtype=dtype)
    content = bytearray(count * dtype.itemsize)
    view, done = memoryview(content), 0
    file.seek(entry.first)
    while done < len(content):
        read = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not read:
            raise ValueError("it ends too early")
        done += read
    return torch.frombuffer(content, dtype=dtype).reshape(entry.shape)
