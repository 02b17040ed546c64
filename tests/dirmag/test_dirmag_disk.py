"""What a direction/magnitude adapter leaves on disk: stock LoRA for everybody, a side-car for ourselves."""
# SPDX-License-Identifier: Apache-2.0

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from fedlora_hf.dirmag import (
    PARTS,
    SIDECAR,
    DirectionPhaseConfig,
    DirMagLoraConfig,
    MagnitudePhaseConfig,
    is_dirmag,
    set_trainable_parts,
)
from fedlora_hf.dirmag import config as dirmag_config
from fedlora_hf.errors import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# Loads the adapter as anybody would and leaves the logits; any warning of PEFT or of loading is an error.
STOCK_LOADER = """
import sys, warnings, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
tokens = torch.load(folder + "/tokens.pt")
base = lambda: AutoModelForCausalLM.from_pretrained(folder + "/base")
with warnings.catch_warnings(), torch.no_grad():
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    peft_logits = PeftModel.from_pretrained(base(), folder + "/adapter")(tokens).logits
    plain = base()
    plain.load_adapter(folder + "/adapter")
    transformers_logits = plain(tokens).logits
assert not [name for name in sys.modules if name.startswith("fedlora_hf")]
torch.save([peft_logits, transformers_logits], folder + "/logits.pt")
"""


def test_stock_peft_and_transformers_load_it_bit_for_bit_without_this_package(base, trained, tokens, tmp_path):
    base().save_pretrained(tmp_path / "base")
    trained.save_pretrained(tmp_path / "adapter")
    torch.save(tokens, tmp_path / "tokens.pt")
    command = [sys.executable, "-c", STOCK_LOADER, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = trained(tokens).logits
    for found in torch.load(tmp_path / "logits.pt"):
        assert torch.equal(found, expected)


def test_the_folder_is_that_of_a_plain_lora_adapter_and_a_side_car(base, trained, options, tmp_path):
    trained.save_pretrained(tmp_path / "ours")
    get_peft_model(base(), LoraConfig(**options)).save_pretrained(tmp_path / "plain")
    ours, plain = (json.loads(Path(tmp_path, name, "adapter_config.json").read_text()) for name in ("ours", "plain"))
    assert set(ours) == set(plain)
    assert ours["peft_type"] == "LORA"
    weights = {name: load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "plain")}
    shapes = {name: {key: tensor.shape for key, tensor in state.items()} for name, state in weights.items()}
    assert shapes["ours"] == shapes["plain"]
    side_car = json.loads((tmp_path / "ours" / SIDECAR).read_text())
    assert side_car == {"trainable_parts": list(PARTS), "axis_a": "row", "axis_b": "row", "direction_seed": 0}
    assert type(PeftConfig.from_pretrained(tmp_path / "ours")) is LoraConfig


def test_the_config_comes_back_with_its_own_fields(base, options, tmp_path):
    config = DirMagLoraConfig(**options, axis_a="column", direction_seed=3, lora_alpha=7, lora_dropout=0.25)
    model = get_peft_model(base(), config)
    set_trainable_parts(model, ["B.magnitude", "A.direction"])
    model.save_pretrained(tmp_path / "run")
    back = DirMagLoraConfig.from_pretrained(tmp_path, subfolder="run")
    assert (back.axis_a, back.axis_b, back.direction_seed, back.lora_alpha) == ("column", "row", 3, 7)
    assert (back.lora_dropout, back.r, set(back.target_modules)) == (0.25, 4, {"q_proj", "v_proj"})
    assert back.trainable_parts == ("A.direction", "B.magnitude")
    assert DirMagLoraConfig.from_pretrained(tmp_path / "run", trainable_parts=PARTS).trainable_parts == PARTS
    assert DirectionPhaseConfig.from_pretrained(tmp_path / "run").trainable_parts == ("A.direction",)
    assert type(MagnitudePhaseConfig.from_pretrained(tmp_path / "run")) is MagnitudePhaseConfig


@pytest.mark.parametrize("low_memory", [False, True])
def test_an_adapter_is_reloaded_for_further_training(base, trained, tokens, fit, tmp_path, low_memory):
    trained.save_pretrained(tmp_path)
    config = MagnitudePhaseConfig.from_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base(), tmp_path, config=config, is_trainable=True, low_cpu_mem_usage=low_memory)
    assert is_dirmag(model)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, trained(tokens).logits, rtol=1e-5, atol=1e-6)
    assert {name.split("lora_")[1] for name, p in model.named_parameters() if p.requires_grad} == {
        "B.default.magnitude"
    }
    before = float(model(tokens, labels=tokens).loss.detach())
    fit(model, tokens, steps=3)
    assert float(model(tokens, labels=tokens).loss.detach()) < before


def test_zero_rows_loaded_without_memory_have_a_direction(base, fresh, tokens, tmp_path):
    fresh.save_pretrained(tmp_path)
    config = DirMagLoraConfig.from_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base(), tmp_path, config=config, is_trainable=True, low_cpu_mem_usage=True)
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_transformers_adds_loads_and_saves_it_split(base, trained, tokens, options, tmp_path):
    trained.save_pretrained(tmp_path / "a")
    model = base()
    model.load_adapter(str(tmp_path / "a"), peft_config=DirMagLoraConfig.from_pretrained(tmp_path / "a"))
    assert is_dirmag(model)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, trained(tokens).logits, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / SIDECAR).is_file()
    assert DirMagLoraConfig.from_pretrained(tmp_path / "b").r == 4


def test_a_plain_adapter_opens_with_the_defaults(base, tokens, options, fit, tmp_path):
    plain = get_peft_model(base(), LoraConfig(**options))
    fit(plain, tokens)
    plain.save_pretrained(tmp_path)
    model = get_peft_model(base(), DirMagLoraConfig.from_pretrained(tmp_path))
    model.load_adapter(tmp_path, "default")
    assert is_dirmag(model)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, rtol=1e-5, atol=1e-6)


def test_the_hub_is_asked_for_both_files_at_the_revision(options, tmp_path, monkeypatch):
    DirMagLoraConfig(**options, direction_seed=5).save_pretrained(str(tmp_path / "sub"))
    asked = []

    def download(repo_id, filename, subfolder=None, revision=None, **kwargs):
        asked.append((repo_id, filename, subfolder, revision))
        return str(tmp_path / subfolder / filename)

    for module in ("peft.config", "fedlora_hf.dirmag.config"):
        monkeypatch.setattr(f"{module}.hf_hub_download", download)
    config = DirMagLoraConfig.from_pretrained("user/repo", subfolder="sub", revision="v1")
    assert config.direction_seed == 5
    assert asked == [("user/repo", name, "sub", "v1") for name in ("adapter_config.json", SIDECAR)]


def test_a_hub_repository_without_side_car_is_plain_but_an_unreachable_hub_is_an_error(options, tmp_path, monkeypatch):
    DirMagLoraConfig(**options, direction_seed=5).save_pretrained(str(tmp_path))
    monkeypatch.setattr("peft.config.hf_hub_download", lambda *args, **kwargs: str(tmp_path / "adapter_config.json"))

    def fails_with(error):
        def download(*args, **kwargs):
            raise error

        return download

    monkeypatch.setattr(dirmag_config, "hf_hub_download", fails_with(EntryNotFoundError("404")))
    assert DirMagLoraConfig.from_pretrained("user/repo").direction_seed == 0
    monkeypatch.setattr(dirmag_config, "hf_hub_download", fails_with(LocalEntryNotFoundError("offline")))
    with pytest.raises(AdapterError, match=r"user/repo: dirmag_config.json is not in the local cache"):
        DirMagLoraConfig.from_pretrained("user/repo")


@pytest.mark.parametrize(
    ("text", "reason"), [("{", "is not a JSON object"), ('{"colour": 1}', "unknown field 'colour'")]
)
def test_a_side_car_that_cannot_be_used_is_an_error(options, tmp_path, text, reason):
    DirMagLoraConfig(**options).save_pretrained(str(tmp_path))
    (tmp_path / SIDECAR).write_text(text)
    with pytest.raises(AdapterError, match=reason):
        DirMagLoraConfig.from_pretrained(tmp_path)
