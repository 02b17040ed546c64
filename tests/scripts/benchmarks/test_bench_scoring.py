"""The benchmarks of scoring and of the start, at a tiny size."""
# SPDX-License-Identifier: Apache-2.0

import csv
from pathlib import Path

import pytest

from scripts.benchmarks import scoring, start

TINY = ["--hidden", "36", "--layers", "1", "--vocabulary", "512", "--examples", "6", "--longest", "48"]
TINY += ["--repeats", "1"]


def test_every_way_to_score_gives_one_loss(tmp_path: Path) -> None:
    scoring.main([*TINY, "--csv", str(tmp_path / "scoring.csv")])
    with (tmp_path / "scoring.csv").open(newline="") as handle:
        rows = {row["kind"]: row for row in csv.DictReader(handle)}
    assert list(rows) == [scoring.ALL, scoring.ANSWERED, scoring.RUN]
    assert len({round(float(row["loss"]), 5) for row in rows.values()}) == 1
    assert all(float(row["ms"]) > 0 for row in rows.values())


def test_losses_that_differ_are_an_error() -> None:
    with pytest.raises(SystemExit, match="the losses differ"):
        scoring.main([*TINY, "--tolerance", "-1"])


def test_starts_are_timed_beside_the_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "KINDS", {"Python alone": "pass", start.STACK: "import json"})
    rows = {str(row["kind"]): row for row in start.measured(2)}
    assert rows[start.STACK]["ratio"] == 1.0
    assert all(float(str(row["ms"])) > 0 for row in rows.values())
