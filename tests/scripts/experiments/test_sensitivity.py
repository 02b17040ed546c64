"""The sensitivity study: deltas are those of the formula, snapshots those of training; the script runs end to end."""
# SPDX-License-Identifier: Apache-2.0

import csv
from pathlib import Path
from types import ModuleType

import models
import pytest
import sample_data
import torch

NAMES = (
    *("sensitivity", "sensitivity_report", "pipeline_comparison", "pipeline_comparison_data"),
    *("pipeline_comparison_report", "map_clients", "tables"),
)
pytestmark = pytest.mark.usefixtures("bare_output")


def test_deltas_are_those_of_the_formula(scripts: dict[str, ModuleType]) -> None:
    first = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    second = torch.tensor([[0.0, 5.0], [0.0, 2.0]])  # the first row turned by 90 degrees and 2 longer
    found = scripts["sensitivity"].deltas(first, second, "row")
    assert found["direction"] == pytest.approx(0.5)
    assert found["magnitude"] == pytest.approx(1.0)
    assert found["relative"] == pytest.approx(1.0 / 3.0)  # the mean of 3, 2, 5, 2
    scaled = scripts["sensitivity"].deltas(7 * first, 7 * second, "row")
    assert scaled["relative"] == pytest.approx(found["relative"])
    assert scaled["magnitude"] == pytest.approx(7 * found["magnitude"])


def study(scripts: dict[str, ModuleType], folder: Path, *more: str) -> list[dict[str, str]]:
    """The rows of one tiny study: two clients, two seeds."""
    tasks = sample_data.write_natural_instructions(folder / "tasks", tasks=2, instances=12)
    given = ["--model", str(models.save_base(folder / "base")), "--natural_instructions", str(tasks), "--groups", "2"]
    given += ["--max_length", "24", "--lora_r", "2", "--per_device_train_batch_size", "2", "--use_cpu"]
    given += ["--num_rounds", "1", "--local_steps", "2", "--steps", "1", "3", "--seeds", "2"]
    given += ["--cache", str(folder / "cache"), "--output_dir", str(folder / "out"), *more]
    scripts["sensitivity"].main(given)
    with (folder / "out" / "deltas.csv").open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_the_script_runs_whole(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    rows = study(scripts, tmp_path)
    assert {row["start"] for row in rows} == set(scripts["sensitivity"].STARTS)
    modules = {row["module"] for row in rows}
    # Between clients at two snapshots and between the two, A and B; the last snapshot by columns as well.
    assert len(rows) == 2 * 3 * len(modules) * 2 * (3 + 2)
    text = (tmp_path / "out" / "tables.md").read_text(encoding="utf-8")
    assert "| published |  |  |  | 1.7 | 41 | 41 |" in text
    for name in ("ratios", "layers", "steps"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000

    def deltas(start: str, factor: str) -> list[float]:
        keys = {"start": start, "between": "clients", "factor": factor, "axis": "row", "step": "1"}
        return [float(row["direction"]) for row in rows if all(row[k] == v for k, v in keys.items())]

    # One step from one A turns it little; two A of their own are as far apart as random directions.
    assert max(deltas("fresh", "A")) < 0.2 < min(deltas("fresh, own", "A"))


def test_the_clients_rate_is_theirs_alone(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    slow = study(scripts, tmp_path / "slow", "--starts", "fresh", "--client_rate", "1e-6")
    fast = study(scripts, tmp_path / "fast", "--starts", "fresh", "--client_rate", "1e-2")
    wanted = {"between": "steps", "factor": "A", "axis": "row"}
    of = [[float(r["direction"]) for r in rows if all(r[k] == v for k, v in wanted.items())] for rows in (slow, fast)]
    assert max(of[0]) < 1e-6 < 1e-4 < min(of[1])


def test_ratios_are_of_means_over_modules(scripts: dict[str, ModuleType]) -> None:
    key = {"data": "d", "seed": 0, "start": "fresh", "between": "clients", "step": 3, "axis": "row"}
    values = {("one", "A"): (0.4, 2.0), ("one", "B"): (0.1, 20.0), ("two", "A"): (0.2, 2.0), ("two", "B"): (0.3, 180.0)}
    rows = [
        {**key, "module": module, "factor": factor, "direction": turn, "magnitude": size, "relative": size / 10}
        for (module, factor), (turn, size) in values.items()
    ]
    (found,) = scripts["sensitivity_report"].ratios(rows)
    assert found["direction A / B"] == pytest.approx(1.5)
    assert found["direction A / B, modules above 1"] == 0.5
    assert found["magnitude B / A"] == pytest.approx(50)
    assert found["relative magnitude B / A, modules above 1"] == 1
