"""The GPU benchmark's code path, at a tiny size on the CPU."""
# SPDX-License-Identifier: Apache-2.0

import csv
from pathlib import Path

import pytest
import torch

from scripts.benchmarks import gpu as bench


def test_the_whole_path_at_a_tiny_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["--tiny", "--csv", str(tmp_path / "gpu.csv"), "--markdown", str(tmp_path / "notes.md")])
    assert torch.get_default_dtype() == torch.float32
    with (tmp_path / "gpu.csv").open(newline="") as handle:
        rows = {row["kind"]: row for row in csv.DictReader(handle)}
    assert list(rows)[:2] == ["bare PEFT loop", "FederatedTrainer.train_client"]
    assert all(float(row["ms"]) > 0 for row in rows.values())
    assert float(rows["bare PEFT loop"]["tokens_s"]) > 0
    assert {"product_mean, 8 clients x 4 modules on cpu", "clair, 8 clients x 4 modules on cpu"} <= set(rows)
    printed, notes = capsys.readouterr().out, (tmp_path / "notes.md").read_text(encoding="utf-8")
    assert "torch" in notes
    assert notes.strip() in printed


def test_the_model_is_bfloat16_with_checkpointing_and_a_float32_adapter(tmp_path: Path) -> None:
    trainer = bench.federated(bench.parse_arguments(["--tiny"]), str(tmp_path))
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
