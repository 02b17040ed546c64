"""The header of a safetensors file says what there is before any value is read, or the file is refused."""
# SPDX-License-Identifier: Apache-2.0

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fedlora_hf.adapter import header
from fedlora_hf.adapter.header import Stored, read_header


def written(path: Path, content: Any, data: int = 0, length: int | None = None) -> Path:
    """A file with that header, and `data` bytes of values that take no room on the disk."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text) if length is None else length) + text)
        file.truncate(8 + len(text) + data)
    return path


def tensor(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_names_dtypes_and_shapes_are_those_that_were_saved(tmp_path: Path) -> None:
    kinds = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "I8": torch.int8}
    tensors = {f"{name}.x": torch.zeros(2, 3, dtype=kind) for name, kind in kinds.items()}
    tensors |= {"scalar": torch.zeros(()), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    found = read_header(tmp_path / "x")
    assert list(found) == sorted(tensors)
    assert {name: entry.shape for name, entry in found.items()} == {k: tuple(v.shape) for k, v in tensors.items()}
    assert found["BF16.x"]._replace(first=0) == Stored("BF16", (2, 3))


BAD: dict[str, tuple[Any, int, str]] = {
    "gap": ({"a": tensor([1], 4, 8)}, 8, "do not fill"),
    "overlap": ({"a": tensor([2], 0, 8), "b": tensor([1], 4, 8)}, 8, "do not fill"),
    "too short": ({"a": tensor([2], 0, 8)}, 4, "do not fill"),
    "too long": ({"a": tensor([2], 0, 8)}, 9, "do not fill"),
    "size": ({"a": tensor([3], 0, 8)}, 8, "does not fit into its place"),
    "dtype": ({"a": tensor([2], 0, 8, "C64")}, 8, "dtype C64"),
    "negative": ({"a": tensor([-2, -1], 0, 8)}, 8, "no shape or no place"),
    "true": ({"a": tensor([True], 0, 4)}, 4, "no shape or no place"),
    "dimensions": ({"a": tensor([1] * 9, 0, 4)}, 4, "no shape or no place"),
    "offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, 4, "no shape or no place"),
    "no tensor": ({"a": 1}, 0, "is no tensor"),
    "list": ([1], 0, "not a JSON object"),
    "not JSON": (b"{'a'", 0, "Expecting"),
    "deep": (b"[" * 100_000, 0, "more than|nested too deeply"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_go_together_is_refused(tmp_path: Path, case: str) -> None:
    content, data, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        read_header(written(tmp_path / "x", content, data))


def test_headers_that_would_unfold_are_refused_before_they_are_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"more than {header.MAX_HEADER_VALUES} values"):
        read_header(written(tmp_path / "x", b'{"a":[' + b"[]," * 500_000 + b"[]]}"))
    with pytest.raises(ValueError, match="header says it has"):
        read_header(written(tmp_path / "x", b"{}", 1 << 30, length=1 << 29))
    with pytest.raises(ValueError, match="header is longer than the file"):
        read_header(written(tmp_path / "x", b"{}", length=2**63))
    (tmp_path / "x").write_bytes(b"abc")
    with pytest.raises(ValueError, match="header is longer than the file"):
        read_header(tmp_path / "x")


def test_a_file_beyond_any_adapter_is_refused_by_its_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="larger than 8192 MiB"):
        read_header(written(tmp_path / "x", {}, header.MAX_WEIGHTS_BYTES))
