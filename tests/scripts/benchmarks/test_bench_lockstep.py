"""The lockstep benchmark's code path at a tiny size: both ways do the same work, and that is told."""
# SPDX-License-Identifier: Apache-2.0

import csv
from pathlib import Path

from scripts.benchmarks import lockstep as bench


def test_both_ways_come_to_the_same_adapters_and_losses(tmp_path: Path) -> None:
    bench.main(["--tiny", "--repeats", "1", "--csv", str(tmp_path / "lockstep.csv")])
    with (tmp_path / "lockstep.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [(row["what"], row["way"]) for row in rows] == [
        (what, way) for what in ("training", "scoring") for way in ("one by one", "lockstep")
    ]
    assert all(float(row["ms"]) > 0 and int(row["tokens_s"]) > 0 for row in rows)
    assert all(0 <= float(row["difference"]) < 1e-5 for row in rows if row["way"] == "lockstep")
