"""The base of a run: no adapter, tokens that it has embeddings for, a head for the classes, loaded by its name."""
# SPDX-License-Identifier: Apache-2.0

import json
from pathlib import Path
from typing import Any

import datasets
import models
import pytest
from peft import LoraConfig, get_peft_model

from fedlora_hf import FederatedConfig, FederatedTrainer
from fedlora_hf.adapter.base import load_base
from fedlora_hf.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("bare_output")


def options(folder: Path, **changes: Any) -> FederatedConfig:
    return FederatedConfig(**models.options(folder, **changes))


def text(count: int = 6) -> datasets.Dataset:
    rows = [{"prompt": f"Copy {n}: ", "completion": f"word {n}"} for n in range(count)]
    return datasets.Dataset.from_list(rows)


def test_an_adapter_s_folder_is_no_base(tmp_path: Path) -> None:
    models.save_base(tmp_path)
    get_peft_model(models.tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is an adapter, not a base model; pass the base .* --initial_adapter"):
        load_base(options(tmp_path / "out", model_name_or_path=str(tmp_path)), None)


def test_a_base_that_carries_an_adapter_of_transformers_is_refused(tmp_path: Path) -> None:
    model = models.tiny_llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="has an adapter of its own"):
        models.federation(tmp_path, model=model)


def test_a_token_without_an_embedding_is_told_before_training(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[2, 3, 64]], "labels": [[2, 3, 64]]})
    with pytest.raises(DataError, match="'ada': has the token id 64, and the model embeddings for 64 tokens"):
        models.federation(tmp_path, {"ada": rows})


def test_a_head_of_other_classes_is_drawn_anew_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.save_base(tmp_path, classifier=True)
    args = options(tmp_path / "out", task="sequence_classification", model_name_or_path=str(tmp_path))
    two = [load_base(args, ["no", "yes"]).model for _ in range(2)]
    assert two[0].score.weight.shape[0] == 2
    assert (two[0].score.weight == two[1].score.weight).all()
    assert "its head has 3 classes and the data have 2" in capsys.readouterr().err
    load_base(args, ["a", "b", "c"])
    assert "its head" not in capsys.readouterr().err


def test_a_trainer_takes_the_name_of_a_base_and_the_record_is_complete(tmp_path: Path) -> None:
    base = str(models.save_base(tmp_path / "base"))
    args = options(tmp_path / "out", num_rounds=1, generation_examples=0, max_length=512)
    trainer = FederatedTrainer(base, args, {"ada": text(), "bob": text()})
    trainer.train()
    assert trainer.processing_class is not None
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["model"]["name_or_path"] == base
    assert record["model"]["parameters"] > 0
    assert record["data"]["num_clients"] == 2
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base
    assert f"base_model: {base}" in (tmp_path / "out" / "README.md").read_text() or record["model"]["local"]
    other = options(tmp_path / "out", model_name_or_path="another/base")
    with pytest.raises(ConfigError, match=r"args\.model_name_or_path says 'another/base'"):
        FederatedTrainer(base, other, {"ada": text()})


def test_what_trainer_complains_of_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        models.federation(tmp_path, report_to="no_such_tracker")
    assert "\n" not in str(caught.value)
    assert "no_such_tracker" in str(caught.value)
