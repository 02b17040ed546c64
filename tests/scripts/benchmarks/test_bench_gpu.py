"""The GPU benchmark's code path, at a tiny size on the CPU; and how its parts are bounded and kept."""
# SPDX-License-Identifier: Apache-2.0

import argparse
import csv
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedlora_hf.aggregation import aggregate
from fedlora_hf.update import AdapterState
from scripts.benchmarks import gpu as bench
from scripts.benchmarks import gpu_parts


def test_the_whole_path_at_a_tiny_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--csv", str(tmp_path / "gpu.csv"), "--markdown", str(tmp_path / "notes.md"), "--cache", str(tmp_path)]
    assert bench.main(["--tiny", *files]) == 0
    assert torch.get_default_dtype() == torch.float32
    with (tmp_path / "gpu.csv").open(newline="") as handle:
        rows = {row["kind"]: row for row in csv.DictReader(handle)}
    assert {row["part"] for row in rows.values()} == set(bench.PARTS)
    assert list(rows)[:2] == ["bare PEFT loop", "FederatedTrainer.train_client"]
    assert all(float(row["ms"]) > 0 for row in rows.values())
    assert float(rows["bare PEFT loop"]["tokens_s"]) > 0
    assert {"product_mean, 8 clients x 4 modules of 32 on cpu", "clair, 8 clients x 4 modules of 32 on cpu"} <= set(
        rows
    )
    printed, notes = capsys.readouterr().out, (tmp_path / "notes.md").read_text(encoding="utf-8")
    assert "torch" in notes
    assert notes.strip() in printed


def row_once(case: argparse.Namespace) -> list[dict[str, object]]:
    """A part that counts how often it was taken."""
    case.taken.append(case.hidden)
    return [gpu_parts.measured("row", len(case.taken))]


def test_a_part_that_is_there_is_not_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PARTS", {"one": bench.Part(row_once, 1)})
    case = bench.parse_arguments(["--tiny", "--cache", str(tmp_path)])
    case.taken = []
    for _ in range(2):
        assert bench.run(case, ["one"]) == {}
    assert case.taken == [32]
    case.hidden = 64  # other sizes are another measurement
    assert bench.run(case, ["one"]) == {}
    assert case.taken == [32, 64]


def test_a_part_that_does_not_fit_waits_for_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PARTS", {"long": bench.Part(row_once, 3600)})
    case = bench.parse_arguments(["--tiny", "--cache", str(tmp_path)])
    case.tiny = False
    lacking = bench.run(case, ["long"])
    assert "call again" in lacking["long"]
    assert bench.report(case, ["long"], lacking) == f"long: **not measured**, {lacking['long']}"


def test_a_command_is_ended_when_its_time_is_over() -> None:
    began = time.monotonic()
    assert bench.bounded([sys.executable, "-c", "import time; time.sleep(60)"], 0.5) == "stopped after 0.5 s"
    assert time.monotonic() - began < 30
    assert bench.bounded([sys.executable, "-c", "raise SystemExit(3)"], 60) == "failed with exit code 3"
    assert bench.bounded([sys.executable, "-c", "pass"], 60) == ""


def test_all_parts_fit_into_the_minutes() -> None:
    assert sum(part.seconds for part in bench.PARTS.values()) <= 8 * 60


def test_the_model_is_bfloat16_with_checkpointing_and_a_float32_adapter(tmp_path: Path) -> None:
    trainer = gpu_parts.federated(bench.parse_arguments(["--tiny"]), str(tmp_path))
    base = trainer.model.get_base_model()
    assert base.lm_head.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in trainer.slot.parameters()} == {torch.float32}
    assert base.is_gradient_checkpointing


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        bench.main([])
    assert end.value.code == 2
    assert "--tiny" in capsys.readouterr().err


def test_two_results_are_compared_by_flags_and_by_their_worst_module() -> None:
    case = bench.parse_arguments(["--tiny"])
    updates = [gpu_parts.random_update(case, number, 2) for number in range(case.clients)]
    one = aggregate(updates, "product_mean")
    halved = {**one.state, "module_01": one.state["module_01"] * 0.5}
    other = replace(one, state=AdapterState(halved), flagged=("client-00",))
    assert gpu_parts.difference([one, one]) == "the same flags, 0.0e+00 apart"
    assert gpu_parts.difference([one, other]) == "OTHER flags, 5.0e-01 apart"
