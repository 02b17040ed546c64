"""Thirty kills, a full disk, files cut short: every run ends in the same bits, and nothing half-written is seen.

The processes are forks of one that has everything imported; `scripts/checks/chaos.py` without --fork kills real ones.
"""
# SPDX-License-Identifier: Apache-2.0

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_a_run_survives_everything_to_the_bit(tmp_path: Path) -> None:
    counts = {"kills": 30, "fills": 3, "disks": 1, "cuts": 4, "seed": 0}
    flags = [text for name, value in counts.items() for text in (f"--{name}", str(value))]
    flags += ["--output_dir", str(tmp_path / "out")]
    command = [sys.executable, "-m", "scripts.checks.chaos", "--fork", "--bare", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    with open(tmp_path / "out" / "chaos.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in ("SIGKILL", "EFBIG", "cut short")}
    assert [row["disturbances"] for row in by_kind["SIGKILL"]] == ["30"]
    assert [row["disturbances"] for row in by_kind["EFBIG"]] == ["1", "1", "1"]
    assert len(by_kind["cut short"]) == 4
    # The kills met the run in different places, in the middle of a round among them.
    moments = {moment.split(": ")[1] for moment in by_kind["SIGKILL"][0]["moments"].split("; ")}
    assert len(moments) >= 8
    assert any(" + 0 " not in moment for moment in moments)
