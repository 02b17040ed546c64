"""Adapter folders: read as stock PEFT writes them, written as it reads them, refused when they are anything else."""
# SPDX-License-Identifier: Apache-2.0

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import sample_updates
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from fedlora_hf.adapter.files import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    module_scales,
    rank_and_alpha,
    read_adapter,
    target_modules,
    write_adapter,
)
from fedlora_hf.adapter.slot import AdapterSlot
from fedlora_hf.errors import AdapterError
from fedlora_hf.update import AdapterState, LoraFactors


def stock(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> PeftModel:
    """An adapter with random factors, saved by PEFT."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes}
    model = get_peft_model(models.tiny_llama(), LoraConfig(**config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.to(dtype).save_pretrained(folder)
    return model.float()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"0.self_attn.q_proj": 5}},
        {"rank_pattern": {r"model\.layers\.1\..*": 3}, "use_rslora": True},
        {"target_modules": "all-linear"},
    ],
    ids=["plain", "rslora", "patterns", "regular expression", "all linear"],
)
def test_what_peft_wrote_is_read_and_written_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = stock(tmp_path / "stock", **changes)
    state, config = read_adapter(tmp_path / "stock")
    assert sample_updates.same_bits(state, AdapterSlot(model).read())
    write_adapter(tmp_path / "ours", state, config)
    again = PeftModel.from_pretrained(models.tiny_llama(), str(tmp_path / "ours"))
    torch.testing.assert_close(models.logits(again), models.logits(model), atol=1e-4, rtol=1e-5)


def test_bfloat16_is_read_as_it_is_and_written_in_float32(tmp_path: Path) -> None:
    stock(tmp_path / "stock", dtype=torch.bfloat16)
    state, config = read_adapter(tmp_path / "stock")
    assert {factors.A.dtype for factors in state.values()} == {torch.bfloat16}
    write_adapter(tmp_path / "ours", state, config)
    written, _ = read_adapter(tmp_path / "ours")
    assert {factors.A.dtype for factors in written.values()} == {torch.float32}
    assert sample_updates.same_bits(
        AdapterState({module: factors.to(torch.float32) for module, factors in state.items()}), written
    )


def test_mixed_ranks_and_scales_are_written_as_one(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    _, config = stock(tmp_path / "stock"), read_adapter(tmp_path / "stock")[1]
    shapes = {module: factors.shape for module, factors in read_adapter(tmp_path / "stock")[0].items()}
    state = AdapterState(
        {
            module: sample_updates.factors(generator, shape, 2 + number, 0.5 + number)
            for number, (module, shape) in enumerate(shapes.items())
        }
    )
    write_adapter(tmp_path / "ours", state, config)
    written, new = read_adapter(tmp_path / "ours")
    assert sample_updates.relative(sample_updates.dense(written), sample_updates.dense(state)) < 1e-6
    assert (new["r"], new["lora_alpha"], new["rank_pattern"]) == (5, 2.5, {})
    loaded = PeftModel.from_pretrained(models.tiny_llama(), str(tmp_path / "ours"))
    assert sample_updates.same_bits(AdapterSlot(loaded).read(), written.in_memory())


def test_rank_and_alpha_are_left_where_they_fit() -> None:
    config = {"r": 4, "lora_alpha": 8, "use_rslora": False}
    assert rank_and_alpha(config, 4, 2.0) == {}
    assert rank_and_alpha({**config, "use_rslora": True}, 4, 4.0) == {}
    assert rank_and_alpha(config, 6, 2.0)["lora_alpha"] == 12
    assert rank_and_alpha({**config, "use_rslora": True}, 4, 2.0)["use_rslora"] is False
    assert rank_and_alpha({**config, "rank_pattern": {"q": 4}}, 4, 2.0)["rank_pattern"] == {}


@pytest.mark.parametrize(
    ("named", "fits"),
    [
        (["q_proj", "v_proj"], True),
        (["0.q_proj", "v_proj"], True),
        (["q_proj"], False),
        (["q_proj", "k_proj", "v_proj"], False),
        (["proj"], False),
        (".*_proj", True),
    ],
)
def test_target_modules_are_those_of_the_state(named: Any, fits: bool) -> None:
    modules = ["layers.0.q_proj", "layers.0.v_proj"]
    assert target_modules({"target_modules": named}, modules) == (named if fits else modules)


def test_factors_are_read_one_module_at_a_time_and_not_kept(tmp_path: Path) -> None:
    stock(tmp_path)
    state, _ = read_adapter(tmp_path)
    module = next(iter(state))
    assert state[module] is not state[module]
    (tmp_path / WEIGHTS).unlink()
    assert len(state) == 4
    with pytest.raises(AdapterError, match="damaged, copy it again"):
        state[module]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock(tmp_path)
    before = models.weight_files(tmp_path)
    state, config = read_adapter(tmp_path)
    doubled = AdapterState({module: LoraFactors(f.A * 2, f.B, f.scale) for module, f in state.items()})

    def full(handle: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_adapter(tmp_path, doubled, config)
    assert models.weight_files(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS]


def changed_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def changed_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return apply


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


Q = f"{PREFIX}model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / CONFIG).unlink(), "adapter_config.json: no such file"),
        (lambda folder: (folder / WEIGHTS).unlink(), "adapter_model.safetensors: no such file"),
        (lambda folder: (folder / CONFIG).write_text("{"), "not readable as JSON"),
        (lambda folder: (folder / CONFIG).write_text("[1]"), "holds a list"),
        (lambda folder: (folder / CONFIG).write_text("[" * 100_000), "not readable as JSON (nested too deeply)"),
        (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe{"), "not readable as JSON"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"junk"), "the file is damaged"),
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]), "the file is damaged"),
        (pickled, "pickled weights can run code"),
        (changed_config(peft_type="IA3"), "peft_type 'IA3'; only 'LORA'"),
        (changed_config(use_dora=True), "use_dora is set"),
        (changed_config(lora_bias=True), "lora_bias is set"),
        (changed_config(r=8), "has rank 4 but its config says 8"),
        (changed_config(lora_alpha=None), "lora_alpha None; must be a finite number"),
        (changed_config(lora_alpha=float("nan")), "lora_alpha nan; must be a finite number"),
        (changed_weights(lambda t: t.pop(f"{Q}.lora_A.weight")), "has lora_B only"),
        (changed_weights(lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(3)})), "DoRA magnitudes"),
        (changed_weights(lambda t: t.update({f"{Q}.lora_embedding_A": torch.ones(3)})), "an embedding's LoRA"),
        (changed_weights(lambda t: t.update({f"{Q}.lora_B.bias": torch.ones(3)})), "a LoRA bias"),
        (changed_weights(lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(3, 16)})), "has A [3, 16] and B"),
        (changed_weights(lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 2, 3)})), "has A [4, 2, 3] and B"),
        (changed_weights(lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 16).int()})), "has dtype I32"),
        (changed_weights(lambda t: [t.pop(name) for name in list(t)]), "no lora_A / lora_B weights"),
    ],
)
def test_what_is_not_plain_lora_is_refused_in_one_line(
    tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    stock(tmp_path)
    damage(tmp_path)
    with pytest.raises(AdapterError) as caught:
        read_adapter(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dora_adapter_of_peft_is_refused(tmp_path: Path) -> None:
    stock(tmp_path, use_dora=True)
    with pytest.raises(AdapterError, match="use_dora is set"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 2, "lora_alpha": 8, "rank_pattern": {"q_proj": 4}}, 2.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"0.q_proj": 1}}, 0.25),
        # A key matches a name's end after a dot, as in PEFT: "proj" is no end of q_proj by itself.
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"proj": 1}}, 2.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"(": 1, "q_proj": 2}}, 0.5),
    ],
)
def test_scale_is_alpha_by_rank(config: dict[str, Any], scale: float) -> None:
    assert module_scales(config, {"model.layers.0.q_proj": 4}, "here") == {"model.layers.0.q_proj": scale}
