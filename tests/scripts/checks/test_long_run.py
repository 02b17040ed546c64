"""Rounds leave nothing behind in the process: the script that measures long runs, on a short one."""
# SPDX-License-Identifier: Apache-2.0

import csv
from pathlib import Path

import pytest

from scripts.checks import long_run


@pytest.mark.usefixtures("bare_output")
@pytest.mark.filterwarnings("ignore::fedlora_hf.errors.ConvergenceWarning")
def test_files_threads_and_objects_do_not_grow_with_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "rounds.csv"
    flags = ["--rounds", "14", "--clients", "3", "--output_dir", str(tmp_path / "out"), "--csv", str(table)]
    growth = long_run.main(flags)["growth"]
    assert growth["open_files"] == pytest.approx(0, abs=1e-6)
    assert growth["threads"] == pytest.approx(0, abs=1e-6)
    # A round's entry in the record and in the log is some tens of containers; an optimizer or a model is hundreds.
    assert growth["objects"] < 60
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["round"]) for row in rows] == list(range(1, 15))
    assert "open_files" in capsys.readouterr().out
