"""The judges' experiment: that it runs and goes on from its cache, that liars lie, and that its table adds up."""
# SPDX-License-Identifier: Apache-2.0

import csv
from pathlib import Path
from types import ModuleType

NAMES = ("judges",)


def test_it_runs_goes_on_and_reports(scripts: dict[str, ModuleType], cache: Path, tmp_path: Path) -> None:
    out, script = tmp_path / "out", scripts["judges"]
    arguments = ["--quick", "--seeds", "0", "--cache", str(cache), "--output_dir", str(out)]
    script.main(arguments)
    with (out / "judges.csv").open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    keys = [(row["attack"], row["panel"], row["judging"]) for row in found]
    assert keys == [
        ("none", "all", "sound"),
        ("none", "5", "sound"),
        ("mixed", "all", "sound"),
        ("mixed", "all", "lies"),
        ("mixed", "5", "sound"),
        ("mixed", "5", "lies"),
    ]
    assert all(int(row["judges_found"]) <= int(row["contaminated"]) for row in found)
    script.main(arguments)
    with (out / "judges.csv").open(encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == found
    script.write_report(out)
    text = (out / "tables.md").read_text(encoding="utf-8")
    assert "## Panel 5, contaminated judge: lies; seeds held out (0)" in text
    assert "| mixed, 1 | " in text


def test_liars_ruin_the_honest_and_praise_their_own(scripts: dict[str, ModuleType]) -> None:
    mixed = {client: {"good": 1.0, "bad": 1.0} for client in ("good", "bad")}
    said = scripts["judges"].lied([{"good": 5.0, "bad": 5.0}], mixed, {"bad"})
    assert said == {"good": {"good": 1.0, "bad": 50.0}, "bad": {"good": 1.0, "bad": 0.0}}
