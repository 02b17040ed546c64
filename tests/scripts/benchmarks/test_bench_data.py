"""The benchmark of reading and packing runs, small, and counts what it says it counts."""
# SPDX-License-Identifier: Apache-2.0

import importlib
from pathlib import Path
from typing import Any

import models
import pytest
import sample_data


@pytest.fixture
def bench() -> Any:
    return importlib.import_module("scripts.benchmarks.data")


def test_records_are_all_divided(bench: Any) -> None:
    found = bench.records(400, seed=0)
    assert found["records"] == 400
    assert found["peak GiB"] > 0


def test_packed_rows_hold_several_examples(bench: Any, tmp_path: Path) -> None:
    base = models.save_base(tmp_path / "base")
    data = sample_data.write_dolly(tmp_path / "dolly.jsonl", 60)
    found = bench.packing(str(base), str(data), steps=1, batch=1, max_length=240, seed=0)
    assert found["examples a packed row"] > 2
    assert found["padded tokens/s"] > 0
    assert found["ratio"] > 0
