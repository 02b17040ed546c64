"""`fedlora aggregate` with data: the losses are those of `fedlora evaluate`, and judges find who harms the others."""
# SPDX-License-Identifier: Apache-2.0

import json
from pathlib import Path
from typing import Any

import models
import pytest
import sample_data
import torch
from peft import LoraConfig, get_peft_model

from fedlora_hf import cli

pytestmark = [
    pytest.mark.usefixtures("bare_output"),
    pytest.mark.filterwarnings("ignore::fedlora_hf.errors.ConvergenceWarning"),
]
CHANGES: list[dict[str, Any]] = [{}, {"r": 4}, {"target_modules": ["down_proj", "o_proj"]}, {}]


def adapters(place: Path, base: Path, scale: float = 0.5) -> list[str]:
    """Four adapters, one of a higher rank, one of more modules: a common change and a fourth of one's own."""
    folders = []
    for seed, changes in enumerate(CHANGES):
        config = {"r": 2, "lora_alpha": 4, "target_modules": ["down_proj"], "task_type": "CAUSAL_LM", **changes}
        model = models.tiny_llama(vocab_size=len(models.tiny_tokenizer()))
        adapted = get_peft_model(model, LoraConfig(**config))
        generator, own = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in sorted(adapted.named_parameters()):
                if "lora_" in name:
                    rows = torch.randn(4, max(parameter.shape), generator=generator)[: config["r"]]
                    common = rows if parameter.shape[0] == config["r"] else rows.T
                    parameter.copy_(scale * (common + 0.25 * torch.randn(parameter.shape, generator=own)))
        adapted.peft_config["default"].base_model_name_or_path = str(base)
        folder = place / f"site{seed}"
        adapted.save_pretrained(folder)
        folders.append(str(folder))
    return folders


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("choice", ["zero", "common"])
def test_the_losses_are_those_of_evaluate(tmp_path: Path, base_model: Path, choice: str) -> None:
    data = sample_data.write_dolly(tmp_path / "new.jsonl", 12)
    folders = adapters(tmp_path, base_model)
    more = ["--dataset", data, "--use_cpu", "--partial_modules", choice, "--aggregation", "product_mean"]
    assert run("aggregate", *folders, "--output_dir", tmp_path / "out", *more) == 0
    numbers = tmp_path / "numbers.json"
    assert run("evaluate", tmp_path / "out", "--dataset", data, "--all", "--use_cpu", "--output", numbers) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    found = json.loads(numbers.read_text())["metrics"]
    assert record["metrics"]["before"]["global"]["loss"] == pytest.approx(found["base"]["loss"], rel=1e-6)
    assert record["metrics"]["after"]["global"]["loss"] == pytest.approx(found["global"]["loss"], rel=1e-5)
    own = {client: facts["metrics"]["local"]["loss"] for client, facts in record["clients"].items()}
    assert own == pytest.approx({client: found[client]["loss"] for client in own}, rel=1e-5)
    assert len({round(loss, 6) for loss in own.values()}) == len(own)
    assert record["metrics"]["after"]["local"]["loss"] == pytest.approx(sum(own.values()) / len(own))
    assert record["options"]["dataset"] == str(data)
    assert record["data"]["num_examples"] == 12


def test_the_table_has_the_losses(tmp_path: Path, base_model: Path, capsys: Any) -> None:
    data = sample_data.write_dolly(tmp_path / "new.jsonl", 8)
    folders = adapters(tmp_path, base_model)
    more = ["--dataset", data, "--use_cpu", "--partial_modules", "common", "--aggregation", "fedavg"]
    assert run("aggregate", *folders[:1], *folders[2:], "--output_dir", tmp_path / "out", *more) == 0
    shown = capsys.readouterr().out
    assert "loss on the given data" in shown
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    for facts in record["clients"].values():
        for view in ("before", "local", "global", "personalised"):
            assert f"{facts['metrics'][view]['loss']:.3f}" in shown
    card = (tmp_path / "out" / "README.md").read_text()
    assert "all on the same examples" in card


def test_judges_are_the_sources_of_the_data(tmp_path: Path, base_model: Path, capsys: Any) -> None:
    """Evidence of the functional kind for every client; a source judges no adapter of its own name."""
    data = [sample_data.write_dolly(tmp_path / f"{name}.jsonl", 6, seed=n) for n, name in enumerate(("site0", "ward"))]
    folders = adapters(tmp_path, base_model)
    more = ["--use_cpu", "--partial_modules", "common", "--functional_judges", 3]
    assert run("aggregate", *folders, "--output_dir", tmp_path / "out", "--dataset", *data, *more) == 0
    assert "judges: site0, ward" in capsys.readouterr().err
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    evidence = record["rounds"][0]["evidence"]
    assert sorted(evidence) == [f"site{n}" for n in range(4)]
    assert all("functional" in kinds for kinds in evidence.values())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--functional_judges", "2"], "functional_judges=2: has no effect without data"),
        (["--model_name_or_path", "base"], "model_name_or_path=base: has no effect without data"),
        (["--dataset", "none.jsonl", "--functional_judges", "2", "--aggregation", "fedavg"], "only clair counts"),
        (["--dataset", "none.jsonl", "--per_device_eval_batch_size", "0"], "must be at least 1"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, flags: list[str], said: str, capsys: Any) -> None:
    assert run("aggregate", tmp_path / "a", tmp_path / "b", "--output_dir", tmp_path / "out", *flags) == 2
    assert said in capsys.readouterr().err
