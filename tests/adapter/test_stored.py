"""Tensors of a file whose header is read once: as safetensors reads them, and what happens when the file changes."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedlora_hf.adapter import stored


def written(path: Path, scale: float = 1.0, rows: int = 5) -> Path:
    draw = torch.Generator().manual_seed(0)
    values = scale * torch.randn(rows, 3, generator=draw)
    tensors = {f"x.{dtype}": values.to(dtype) for dtype in stored.DTYPES.values()}
    save_file({**tensors, "empty": torch.zeros(0, 4), "number": torch.tensor(scale)}, path, {"format": "pt"})
    return path


def test_tensors_are_those_that_safetensors_reads(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors")
    file, expected = stored.StoredFile(path), load_file(path)
    assert set(file.entries) == set(expected)
    with patch.object(stored, "read_header", side_effect=AssertionError("the header is read once")):
        for name, tensor in expected.items():
            (found,) = file.tensors(name)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)
        assert len(file.tensors(*expected)) == len(expected)


def test_a_file_written_again_is_read_again_and_another_one_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors")
    file = stored.StoredFile(path)
    written(tmp_path / "b.safetensors", scale=2.0).replace(path)
    assert torch.equal(file.tensors("number")[0], torch.tensor(2.0))
    written(tmp_path / "b.safetensors", rows=6).replace(path)
    with pytest.raises(ValueError, match="changed while it was read"):
        file.tensors("number")
    path.unlink()
    with pytest.raises(OSError, match="No such file"):
        file.tensors("number")


def test_other_dtypes_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2, dtype=torch.int32)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="x has dtype I32, not one of F16, BF16"):
        stored.StoredFile(tmp_path / "a.safetensors")
