"""The benchmark of processes: its model of a round is the schedule's, and a tiny run fills the whole table."""
# SPDX-License-Identifier: Apache-2.0

import csv
from pathlib import Path

import pytest

from scripts.benchmarks import processes as bench

COSTS = {"a": 5.0, "b": 1.0, "c": 4.0, "d": 2.0}


def test_a_round_takes_as_long_as_the_process_with_the_most_work() -> None:
    assert bench.planned("two, in turns", COSTS) == [["a", "c"], ["b", "d"]]
    assert bench.planned("two, longest first", COSTS) == [["a", "b"], ["c", "d"]]
    makespans = {way: bench.makespan(bench.planned(way, COSTS), COSTS) for way in (*bench.WAYS, "eight, longest first")}
    assert makespans == {
        "one process": 12.0,
        "two, in turns": 9.0,
        "two, longest first": 6.0,
        "eight, longest first": 5.0,
    }


@pytest.mark.slow
def test_a_tiny_run_of_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "")
    sizes = {"hidden": 16, "clients": 5, "steps": 2, "most": 4, "batch": 2, "tokens": 8, "repeats": 1}
    flags = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    bench.main([*flags, "--csv", str(tmp_path / "processes.csv")])
    with (tmp_path / "processes.csv").open(newline="") as handle:
        rows = {row["kind"]: row for row in csv.DictReader(handle)}
    assert list(rows)[:3] == list(bench.WAYS)
    assert rows["one process"]["speed_up"] == rows["one client, one process"]["speed_up"] == "1.0"
    for way in ("two, longest first", "one client, two together"):
        assert float(rows[way]["s"]) > 0
    assert float(rows["eight, longest first"]["modelled_speed_up"]) > 0
