"""The slot in the model: what is read is what was written; the carried adapter adds exactly its update."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path
from typing import Any

import models
import pytest
import sample_updates
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model

from fedlora_hf import FederatedConfig
from fedlora_hf.adapter import slot as adapters
from fedlora_hf.adapter.files import write_adapter
from fedlora_hf.adapter.slot import AdapterSlot, set_frozen, with_adapter
from fedlora_hf.errors import AdapterError, ConfigError
from fedlora_hf.update import AdapterState, LoraFactors, state_sum

CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def adapted(**changes: Any) -> PeftModel:
    return with_adapter(models.tiny_llama(), LoraConfig(**{**CONFIG, **changes}), seed=0)


def random_state(slot: AdapterSlot, rank: int, scale: float = 1.0, seed: int = 1) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    state = {m: sample_updates.factors(generator, f.shape, rank, scale) for m, f in slot.read().items()}
    return AdapterState(state) if not slot.wrappers else AdapterState(state, slot.read().extras)


def test_reading_gives_detached_copies_on_the_cpu_in_float32() -> None:
    model = adapted().to(torch.bfloat16)
    slot = AdapterSlot(model)
    state = slot.read()
    assert list(state) == sorted(f"model.layers.{n}.self_attn.{p}" for n in (0, 1) for p in ("q_proj", "v_proj"))
    for factors in state.values():
        assert factors.A.dtype == factors.B.dtype == torch.float32
        assert not factors.A.requires_grad
        assert factors.scale == 2.0
    slot.layers["model.layers.0.self_attn.q_proj"].lora_A["default"].weight.data.zero_()
    assert state["model.layers.0.self_attn.q_proj"].A.abs().max() > 0


def test_what_is_written_is_read_and_parameters_keep_their_identity() -> None:
    slot = AdapterSlot(adapted())
    before = [id(parameter) for parameter in slot.parameters()]
    state = random_state(slot, rank=4, scale=2.0)
    slot.write(state)
    assert sample_updates.same_bits(slot.read(), state)
    assert [id(parameter) for parameter in slot.parameters()] == before
    assert len(before) == 8


@pytest.mark.parametrize(("rank", "scale"), [(2, 2.0), (4, 0.5), (1, 16.0)])
def test_lower_ranks_and_other_scales_are_the_same_update(rank: int, scale: float) -> None:
    slot = AdapterSlot(adapted())
    state = random_state(slot, rank, scale)
    slot.write(state)
    assert all(factors.rank == 4 and factors.scale == 2.0 for factors in slot.read().values())
    assert sample_updates.relative(sample_updates.dense(slot.read()), sample_updates.dense(state)) < 1e-6


def test_a_higher_rank_and_other_modules_are_refused() -> None:
    slot = AdapterSlot(adapted())
    with pytest.raises(AdapterError, match=r"rank 5 does not fit the model's 4; truncate it or raise lora_r"):
        slot.write(random_state(slot, 5))
    state = dict(random_state(slot, 2))
    del state["model.layers.1.self_attn.v_proj"]
    with pytest.raises(AdapterError, match=r"model\.layers\.1\.self_attn\.v_proj.*not in both"):
        slot.write(AdapterState(state))


def test_only_the_factors_named_are_trainable() -> None:
    model = adapted()
    slot = AdapterSlot(model)
    for chosen in (("B",), ("A",), ("A", "B")):
        slot.train_only(chosen)
        trainable = {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad}
        assert trainable == {f"lora_{factor}" for factor in chosen}


def test_a_classifiers_head_is_an_extra() -> None:
    model = with_adapter(models.tiny_classifier(), LoraConfig(**{**CONFIG, "task_type": "SEQ_CLS"}), seed=0)
    slot = AdapterSlot(model)
    state = slot.read()
    assert list(state.extras) == ["score.weight"]
    head = torch.ones_like(state.extras["score.weight"])
    slot.write(AdapterState(dict(state), {"score.weight": head}))
    assert torch.equal(slot.read().extras["score.weight"], head)
    slot.train_only(("B",))
    assert sum("score" in name for name, p in model.named_parameters() if p.requires_grad) == 1


def test_the_fresh_adapter_is_drawn_from_the_seed_and_the_generator_left_alone() -> None:
    before = torch.random.get_rng_state()
    one, two = AdapterSlot(adapted()).read(), AdapterSlot(adapted()).read()
    other = AdapterSlot(with_adapter(models.tiny_llama(), LoraConfig(**CONFIG), seed=1)).read()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert sample_updates.same_bits(one, two)
    assert not sample_updates.same_bits(one, other)
    assert all(factors.B.abs().max() == 0 for factors in one.values())


@pytest.mark.parametrize("rank", [2, 4, 11])
def test_a_carried_adapter_adds_exactly_its_update(tmp_path: Path, rank: int) -> None:
    model = adapted()
    slot = AdapterSlot(model)
    state, carried = random_state(slot, 4, scale=2.0), random_state(slot, rank, seed=2)
    slot.write(state)
    alone = models.logits(model)
    set_frozen(model, carried)
    together = models.logits(model)
    write_adapter(tmp_path, state_sum(state, carried), slot.config())
    stock = PeftModel.from_pretrained(models.tiny_llama(), str(tmp_path))
    torch.testing.assert_close(together, models.logits(stock), atol=1e-5, rtol=1e-5)
    assert (together - alone).abs().max() > 1e-3
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all(".default." in name for name in trainable)
    assert sample_updates.same_bits(slot.read(), state)
    set_frozen(model, random_state(slot, 3, seed=3))
    set_frozen(model, None)
    assert torch.equal(models.logits(model), alone)
    assert list(model.peft_config) == ["default"]


def test_config_is_peft_s_own_and_does_not_depend_on_the_order_of_sets() -> None:
    config = AdapterSlot(adapted()).config()
    assert config["peft_type"] == "LORA"
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["r"] == 4
    assert config["inference_mode"] is True


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(r=2, target_modules=["embed_tokens"]), "LoRA on an embedding cannot be aggregated"),
        (LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "DoRA magnitudes cannot be aggregated"),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "has no LoRA layers"),
    ],
)
def test_what_cannot_be_aggregated_is_refused(config: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        AdapterSlot(get_peft_model(models.tiny_llama(), config))


def test_targets_that_match_nothing_name_what_there_is() -> None:
    with pytest.raises(ConfigError) as caught:
        adapted(target_modules=["query", "value"])
    message = str(caught.value)
    assert message.startswith("target_modules=query,value: no adapter could be added")
    assert "down_proj, gate_proj, k_proj" in message
    assert "\n" not in message


def test_a_target_that_matches_nothing_among_others_that_do_is_refused() -> None:
    """PEFT adapts q_proj alone, and says nothing."""
    model = models.tiny_llama()
    with pytest.raises(
        ConfigError, match=r"^target_modules=q_proj,value: no module's name ends in value; this model's"
    ):
        with_adapter(model, LoraConfig(**{**CONFIG, "target_modules": ["value", "q_proj"]}), seed=0)
    assert not any("lora" in name for name, _ in model.named_parameters())  # the model is as it was
    with_adapter(
        model, LoraConfig(**{**CONFIG, "target_modules": ["self_attn.q_proj", "layers.0.mlp.up_proj"]}), seed=0
    )


def test_an_adapter_of_another_name_is_not_there() -> None:
    with pytest.raises(AdapterError, match=r"adapter 'other': not in the model \(default\)"):
        AdapterSlot(adapted(), "other")


def test_options_become_peft_s_config(tmp_path: Path) -> None:
    def config(**changes: Any) -> LoraConfig:
        return adapters.peft_config(FederatedConfig(**models.options(tmp_path, **changes)))

    plain = config(lora_r=3, lora_alpha=6, lora_dropout=0.25, use_rslora=True, target_modules=["q_proj,k_proj"])
    assert (plain.r, plain.lora_alpha, plain.lora_dropout, plain.use_rslora) == (3, 6, 0.25, True)
    assert plain.target_modules == {"q_proj", "k_proj"}
    assert plain.task_type == "CAUSAL_LM"
    assert config(target_modules=["all-linear"]).target_modules == "all-linear"
    assert config(task="sequence_classification").task_type == "SEQ_CLS"
    assert type(config(adapter="dirmag")).__name__ == "DirMagLoraConfig"


def test_scales_of_rslora_and_patterns_are_read_from_the_model() -> None:
    slot = AdapterSlot(adapted(use_rslora=True, rank_pattern={"v_proj": 2}, alpha_pattern={"1.self_attn.q_proj": 3}))
    scales = {module: factors.scale for module, factors in slot.read().items()}
    assert scales["model.layers.0.self_attn.q_proj"] == pytest.approx(8 / 4**0.5)
    assert scales["model.layers.1.self_attn.q_proj"] == pytest.approx(3 / 4**0.5)
    assert scales["model.layers.0.self_attn.v_proj"] == pytest.approx(8 / 2**0.5)
    assert {f.rank for f in slot.read().values()} == {2, 4}
    state = {m: LoraFactors(f.A, torch.ones_like(f.B), f.scale) for m, f in slot.read().items()}
    slot.write(AdapterState(state))
    assert sample_updates.same_bits(slot.read(), AdapterState(state))
