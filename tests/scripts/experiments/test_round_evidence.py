"""Evidence over rounds: who is contaminated, what counts as flagged, the script from end to end and from its cache."""
# SPDX-License-Identifier: Apache-2.0

import csv
import json
from pathlib import Path
from types import ModuleType

import pytest

from fedlora_hf.rounds import output

NAMES = ("rounds", "copying", "tables")
pytestmark = pytest.mark.filterwarnings("ignore::fedlora_hf.errors.ConvergenceWarning")


def test_the_contaminated_train_on_wrong_lines_under_their_own_names(scripts: dict[str, ModuleType]) -> None:
    rounds, copying = scripts["rounds"], scripts["copying"]
    scarce = copying.REGIMES["scarce"]
    clean, nobody = rounds.cohort(scarce, 0, "none", 0)
    mixed, bad = rounds.cohort(scarce, 0, "permuted labels", 4)
    assert nobody == []
    assert len(bad) == 4
    assert all(len(mixed[name]["validation"]) == len(clean[name]["validation"]) for name in bad)  # they judge, wrongly
    assert sorted(mixed) == sorted(clean) == [f"client-{number:02d}" for number in range(12)]
    assert [name for name in sorted(mixed) if mixed[name]["train"][:] != clean[name]["train"][:]] == bad
    assert set(bad) < set(rounds.cohort(scarce, 0, "permuted labels", 5)[1])


def test_one_score_above_its_threshold_flags(scripts: dict[str, ModuleType]) -> None:
    usable, blind = {"score": 2.0, "threshold": 1.0}, {"score": 2.0, "threshold": None}
    evidence = {
        "a": {"scale": usable, "subspace": blind},
        "b": {"scale": blind},
        "c": {"scale": {**usable, "score": 1}},
    }
    assert scripts["rounds"].flagged(evidence) == {"a"}


def test_the_script_runs_and_goes_on(
    scripts: dict[str, ModuleType], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "write_report", output.write_report)  # the script replaces it: put back afterwards
    out = tmp_path / "out"
    arguments = ["--quick", "--seeds", "1", "--rounds", "2", "--cache", str(cache), "--output_dir", str(out)]
    scripts["rounds"].main(arguments)
    with (out / "rounds.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (3 + 3 + 1)  # clean, contaminated, and the benign alone
    assert {(row["attack"], row["contaminated"]) for row in rows} == {
        ("none", "0"),
        ("permuted labels", "5"),
        ("any", "5"),
    }
    assert all(int(row["contaminated flagged so far"]) <= int(row["contaminated"]) for row in rows)
    first = {row["method"]: row for row in rows if row["round"] == "1" and row["attack"] == "permuted labels"}
    assert first["clair"]["contaminated flagged now"] == first["clair"]["contaminated flagged so far"]
    assert first["clair"]["loss"] != first["multikrum"]["loss"]
    text = (out / "tables.md").read_text(encoding="utf-8")
    assert "| scarce | permuted labels | 5 |" in text
    assert (out / "rounds.png").stat().st_size > 10_000

    place = cache / "rounds" / "scarce" / "seed-0" / "permuted labels-5-clair-2.json"
    changed = [row | {"loss": 77.0} for row in json.loads(place.read_text())]
    place.write_text(json.dumps(changed))
    scripts["rounds"].main(arguments)
    with (out / "rounds.csv").open(encoding="utf-8") as file:
        again = [row for row in csv.DictReader(file) if row["method"] == "clair" and row["contaminated"] == "5"]
    assert {row["loss"] for row in again} == {"77.0"}  # from the cache
