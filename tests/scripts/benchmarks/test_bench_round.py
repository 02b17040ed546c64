"""The benchmark of rounds runs at a tiny size, compares like with like, and writes what it prints."""
# SPDX-License-Identifier: Apache-2.0

import csv
from pathlib import Path
from typing import Any

import pytest

from scripts.benchmarks import round as bench


def test_a_row_a_way_and_the_same_update_as_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden": 16, "clients": 2, "steps": 2, "batch": 2, "tokens": 8, "repeats": 1, "rounds": 1}
    flags = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    bench.main([*flags, "--csv", str(tmp_path / "round.csv")])
    printed = capsys.readouterr().out
    assert "largest difference of an update from the raw loop's: 0\n" in printed
    with (tmp_path / "round.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["kind"] for row in rows][:3] == ["raw", "raw with a DataLoader", "FederatedTrainer.train_client"]
    assert len(rows) == 7
    assert rows[0]["ratio"] == rows[0]["cpu_ratio"] == "1.0"
    for row in rows:
        assert float(row["ms"]) > 0
        assert row["kind"] in printed


def test_ratios_are_medians_of_pairs_and_kinds_take_turns() -> None:
    seen: list[str] = []
    kinds: dict[str, Any] = {name: lambda item, name=name: seen.append(name + item) for name in ("a", "b")}
    times = bench.common.in_turns(kinds, ["1", "2"], repeats=2)
    assert seen == ["a1", "b1", "b2", "a2", "a1", "b1", "b2", "a2"]
    assert {kind: len(own) for kind, own in times.items()} == {"a": 4, "b": 4}
    seconds = bench.common.Seconds
    drifting = {
        "raw": [seconds(1, 1), seconds(4, 2), seconds(2, 2)],
        "x": [seconds(2, 3), seconds(8, 2), seconds(2, 2)],
    }
    rows = bench.common.compared(drifting, "raw")
    assert rows[1] == {"kind": "x", "ms": 2000, "ratio": 2.0, "cpu_ratio": 1.0}


def test_memory_is_this_process_at_its_largest(capsys: pytest.CaptureFixture[str]) -> None:
    before = bench.resident_peak()
    block = bytearray(before)  # at least doubles it, whatever the peak was before
    assert bench.resident_peak() >= before
    del block
    bench.main(["--peak_of", "2", "--hidden", "16", "--rank", "2", "--rounds", "1"])
    adapter, built, trained, peak = (int(text) for text in capsys.readouterr().out.split()[-4:])
    assert adapter == 4 * 2 * 2 * (4 * 32 + 3 * 48)  # float32, r=2, two layers: q, k, v, o and the three of the MLP
    assert adapter < built <= trained <= peak
