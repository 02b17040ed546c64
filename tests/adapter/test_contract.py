"""The adapter contract: total over LoraConfig, refused at construction with the remedy, and what travels does."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import models
import pytest
import sample_updates
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from fedlora_hf import DirMagLoraConfig, FederatedTrainer
from fedlora_hf.adapter import contract
from fedlora_hf.adapter.files import read_adapter
from fedlora_hf.adapter.slot import AdapterSlot, check_config, with_adapter
from fedlora_hf.errors import AdapterError, ConfigError

pytestmark = pytest.mark.usefixtures("bare_output")
TARGETS = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}


def trainer(folder: Path, config: Any = None, **changes: Any) -> FederatedTrainer:
    return models.federation(folder, more={"peft_config": config} if config else None, **changes)


def test_every_field_of_lora_config_has_its_rule() -> None:
    names = {field.name for field in dataclasses.fields(LoraConfig)}
    assert names - set(contract.FIELDS) == set(), "PEFT has new fields: say in the table what becomes of them"
    # The lower bound's PEFT may know fewer.
    assert {"r", "bias", "rank_pattern", "target_parameters", "init_lora_weights"} <= names
    for name, rule in contract.FIELDS.items():
        assert (rule.fate == "refused") == bool(rule.why), name


def test_the_defaults_are_refused_nothing() -> None:
    for config in (LoraConfig(**TARGETS), DirMagLoraConfig(**TARGETS)):
        check_config(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"trainable_token_indices": [5, 6]},
        {"target_parameters": ["mlp.experts.down_proj"]},
        {"layer_replication": [(0, 1), (0, 2)]},
        {"alora_invocation_tokens": [3]},
        {"use_dora": True},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
        {"init_lora_weights": "eva"},
        {"init_lora_weights": "mica"},
        {"ensure_weight_tying": True},
        {"inference_mode": True},
    ],
    ids=lambda changes: "-".join(map(str, changes)),
)
def test_what_cannot_travel_is_refused_at_construction(tmp_path: Path, changes: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT's about combinations
        config = LoraConfig(r=2, **TARGETS, **changes)
    with pytest.raises(ConfigError) as caught:
        trainer(tmp_path, config)
    message = str(caught.value)
    assert next(iter(changes)) in message
    assert "; " in message
    assert "\n" not in message


def test_another_kind_of_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only LoRA travels"):
        trainer(tmp_path, IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[]))


def test_the_adapter_says_the_task_of_the_run(tmp_path: Path) -> None:
    """Whoever loads it takes the class from there: none, or another, would be loaded otherwise than it was trained."""
    config = LoraConfig(r=2, target_modules=["q_proj"])
    run = trainer(tmp_path / "none", config)
    assert run.slot.config()["task_type"] == "CAUSAL_LM"
    assert config.task_type is None  # the caller's own is as it was
    wrong = LoraConfig(r=2, **{**TARGETS, "task_type": "SEQ_CLS"})
    said = "peft_config: task_type=SEQ_CLS: the run's task is causal_lm, whose adapters are CAUSAL_LM; leave it out"
    with pytest.raises(ConfigError, match=said):
        trainer(tmp_path / "other", wrong)
    with pytest.raises(ConfigError, match=said):
        models.federation(tmp_path / "had", model=get_peft_model(models.tiny_llama(), wrong))


def test_a_field_of_a_later_peft_is_refused_when_it_is_set() -> None:
    @dataclasses.dataclass
    class Later(LoraConfig):
        quantum: int | None = None

    assert contract.unknown(Later()) is None
    assert "quantum=3" in str(contract.unknown(Later(quantum=3)))


def test_a_parameter_that_the_slot_does_not_own_is_refused(tmp_path: Path) -> None:
    model = with_adapter(models.tiny_llama(), LoraConfig(r=2, **TARGETS), 0)
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"model\.norm\.weight is trainable and no part of adapter 'default'"):
        models.federation(tmp_path, model=model)


def test_an_adapter_of_any_name_is_trained_and_two_are_refused(tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=4, **TARGETS)
    mine = get_peft_model(models.tiny_llama(), config, adapter_name="mine")
    start = AdapterSlot(mine, "mine").read()
    federated = models.federation(tmp_path / "mine", model=mine, num_rounds=1, aggregation="stacking")
    assert sample_updates.same_bits(federated.initial, start)
    federated.train()
    assert not sample_updates.same_bits(federated.run.state, start)
    stock = PeftModel.from_pretrained(models.tiny_llama(), tmp_path / "mine")
    assert (
        sample_updates.relative(
            sample_updates.dense(AdapterSlot(stock).read()), sample_updates.dense(federated.run.state)
        )
        < 1e-6
    )
    mine.add_adapter("other", config)
    mine.base_model.set_adapter(["mine", "other"])
    with pytest.raises(ConfigError, match="2 active adapters"):
        models.federation(tmp_path / "two", model=mine)


@pytest.mark.parametrize("method", ["fedavg", "product_mean", "clair", "stacking"])
def test_ranks_of_a_pattern_come_back_from_every_round(tmp_path: Path, method: str) -> None:
    config = LoraConfig(r=2, lora_alpha=4, rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 3}, **TARGETS)
    federated = trainer(tmp_path, config, aggregation=method, lora_r=2, personalise="method")
    federated.train()
    assert [entry["quarantined"] for entry in federated.run.record.rounds] == [{}, {}]
    stock = PeftModel.from_pretrained(models.tiny_llama(), tmp_path)
    written = AdapterSlot(stock).read()
    assert sample_updates.relative(sample_updates.dense(written), sample_updates.dense(federated.run.state)) < 1e-6
    assert sample_updates.dense(written).norm() > 0
    if method != "stacking":  # whose sums grow
        ranks = {module.rsplit(".", 1)[-1]: factors.rank for module, factors in written.items()}
        assert ranks == {"q_proj": 4, "v_proj": 2}


@pytest.mark.parametrize("some", [{"layers_to_transform": [1]}, {"exclude_modules": ["layers.0.self_attn.q_proj"]}])
def test_some_layers_alone_are_trained_and_load_as_they_are(tmp_path: Path, some: dict[str, Any]) -> None:
    federated = trainer(tmp_path, LoraConfig(r=2, lora_alpha=4, **TARGETS, **some), num_rounds=1)
    federated.train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        stock = PeftModel.from_pretrained(models.tiny_llama(), tmp_path)
    assert sample_updates.same_bits(AdapterSlot(stock).read(), federated.run.state.in_memory())


def test_a_module_trained_whole_starts_alike_for_every_client(tmp_path: Path) -> None:
    """Reset per client, sent, averaged and saved: equal clients of one step each give the same head."""
    config = LoraConfig(r=2, lora_alpha=4, modules_to_save=["lm_head"], **TARGETS)
    same = {name: {"train": models.token_examples(4, seed=1)} for name in ("ada", "bob")}
    federated = models.federation(
        tmp_path, same, more={"peft_config": config}, num_rounds=1, per_device_train_batch_size=4, local_steps=1
    )
    federated.train()
    first, second = (federated.store.update(1, name).state.extras["lm_head.weight"] for name in same)
    assert torch.allclose(first, second, atol=1e-6)
    assert not torch.equal(first, federated.initial.extras["lm_head.weight"])
    assert torch.allclose(read_adapter(tmp_path)[0].extras["lm_head.weight"], first, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, r"holds lm_head\.weight.*modules_to_save"),
        ({"r": 8}, "has rank 8, more than the run's 2; pass --lora_r 8"),
    ],
)
def test_an_initial_adapter_that_holds_more_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = LoraConfig(**{"r": 2, "lora_alpha": 4, **TARGETS, **changes})
    slot = AdapterSlot(with_adapter(models.tiny_llama(), config, 0))
    for layer in slot.layers.values():
        torch.nn.init.ones_(layer.lora_B["default"].weight)
    slot.model.save_pretrained(tmp_path / "first")
    with pytest.raises(ConfigError, match=message):
        models.federation(tmp_path / "run", initial_adapter=str(tmp_path / "first"), target_modules=["q_proj,v_proj"])


def test_an_initial_adapter_of_a_changed_base_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(models.tiny_llama(), LoraConfig(r=2, init_lora_weights="olora", **TARGETS))
    model.save_pretrained(tmp_path / "first")
    with pytest.raises(AdapterError, match="changes the base model's weights"):
        models.federation(tmp_path / "run", initial_adapter=str(tmp_path / "first"))
