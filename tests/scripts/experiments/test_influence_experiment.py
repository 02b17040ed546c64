"""The influence experiment: that it runs and goes on from its cache, and that its tables say what the rows hold."""
# SPDX-License-Identifier: Apache-2.0

import csv
from pathlib import Path
from types import ModuleType

import pytest
import torch

NAMES = ("influence", "influence_report", "influence_cost")


def rows(folder: Path, name: str = "attacks") -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_it_runs_goes_on_and_reports(scripts: dict[str, ModuleType], cache: Path, tmp_path: Path) -> None:
    out, script = tmp_path / "out", scripts["influence"]
    arguments = ["--quick", "--seeds", "0", "--cache", str(cache), "--output_dir", str(out)]
    script.main(arguments)
    found = rows(out)
    assert {row["attack"] for row in found} == {"none", "mixed"}
    assert {"oracle", "clair", "clair, flags", "multikrum"} <= {row["rule"] for row in found}
    assert [row["damage"] for row in found if row["rule"] == "oracle"] == ["0.0", "0.0"]
    script.main(arguments)
    assert rows(out) == found
    scripts["influence_report"].write_report(out)
    text = (out / "tables.md").read_text(encoding="utf-8")
    assert "| none | 0 of 12 | " in text
    assert (out / "loss.png").stat().st_size > 10_000


def test_every_attack_of_the_catalogue_has_its_cell(scripts: dict[str, ModuleType]) -> None:
    script = scripts["influence"]
    in_cells = {attack for attack, _ in script.cells()}
    assert set(script.ATTACKS) <= in_cells | set(script.OVER_ROUNDS)


def test_cost_is_nothing_where_all_are_alike(scripts: dict[str, ModuleType]) -> None:
    g = torch.Generator().manual_seed(0)
    common = torch.randn(20, 2, generator=g, dtype=torch.float64) @ torch.randn(2, 16, generator=g, dtype=torch.float64)
    alike = [common + 0.01 * torch.randn(20, 16, generator=g, dtype=torch.float64) for _ in range(9)]
    distortion, kept = scripts["influence_cost"].cost({"W": alike})
    assert distortion < 0.01
    assert kept == pytest.approx([1.0] * 9, abs=0.01)


def test_a_table_has_means_and_spreads(scripts: dict[str, ModuleType]) -> None:
    found = [{"attack": "a", "contaminated": "4", "rule": "clair", "loss": loss, "seed": "1"} for loss in ("1", "2")]
    assert scripts["influence_report"].table(found, "loss")[-1] == "| a | 4 of 12 | 1.50 ± 0.71 |"
    assert scripts["influence_report"].spread([{"loss": ""}], "loss") == ""
