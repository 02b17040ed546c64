"""Bases in 4 and 8 bits: `fedlora train` on the CPU leaves adapters that stock PEFT loads onto the same base."""
# SPDX-License-Identifier: Apache-2.0

import json
from pathlib import Path
from typing import Any

import models
import pytest
import sample_data
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fedlora_hf import FederatedConfig, FederatedTrainer, cli
from fedlora_hf.errors import ConfigError
from fedlora_hf.launch import quantisation
from fedlora_hf.launch.quantisation import loading

pytest.importorskip("bitsandbytes")
FLAGS = {
    "partition_by": "iid",
    "num_clients": 3,
    "num_rounds": 1,
    "local_steps": 6,
    "per_device_train_batch_size": 4,
    "lora_r": 2,
    "learning_rate": 0.01,
    "generation_examples": 1,
    "max_new_tokens": 3,
    "max_length": 64,
    "aggregation": "fedavg",
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hidden size 64: a row of a matrix fills one block of 4-bit numbers."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = models.tiny_tokenizer()
    models.tiny_llama(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("adapter", ["lora", "dirmag"])
def test_a_round_on_a_quantised_base(adapter: str, bits: int, base: Path, tmp_path: Path, bare_output: None) -> None:
    data, out = sample_data.write_dolly(tmp_path / "dolly.jsonl", 40), tmp_path / "out"
    flags = {"model_name_or_path": base, "dataset": data, "output_dir": out, "adapter": adapter, **FLAGS}
    flags |= {f"load_in_{bits}bit": True, "gradient_checkpointing": True, "use_bnb_nested_quant": bits == 4}
    assert cli.main(["train", *(f"--{name}={value}" for name, value in flags.items())]) == 0
    record = json.loads((out / "run.json").read_text())
    assert record["model"]["bits"] == bits
    before, after = record["metrics"]["before"]["global"], record["metrics"]["after"]["global"]
    assert after["loss"] < before["loss"]
    assert {key.split(".")[-2] for key in load_file(out / "adapter_model.safetensors")} == {"lora_A", "lora_B"}
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=bits == 4,
        bnb_4bit_compute_dtype=torch.float32,
    )
    quantised = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, device_map="cpu")
    layer = quantised.model.layers[0].self_attn.q_proj
    assert type(layer).__name__ == {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    bare = models.logits(quantised)
    assert (models.logits(PeftModel.from_pretrained(quantised, str(out))) - bare).abs().max() > 1e-4


def test_an_evaluation_takes_no_gradient_from_what_is_trained_after_it(base: Path, tmp_path: Path) -> None:
    """On a CPU with AVX512-BF16 bitsandbytes would, see `keep_trainable`; on others this holds by itself."""
    trained = []
    for evaluated in (False, True):
        args = FederatedConfig(**models.options(tmp_path / str(evaluated), load_in_4bit=True))
        model = AutoModelForCausalLM.from_pretrained(base, **loading(args))
        clients = models.token_clients({"ada": 4}, held_out=2)
        trainer = FederatedTrainer(model, args, clients)
        if evaluated:
            trainer.test_metrics({"ada": trainer.initial})
        trained.append(trainer.train_client("ada", 1).state)
    for module, factors in trained[0].items():
        assert torch.equal(factors.B, trained[1][module].B)
        assert factors.B.any()


def test_what_is_asked_of_transformers(tmp_path: Path) -> None:
    options: Any = models.options(tmp_path)
    assert loading(FederatedConfig(**options)) == {}
    config = loading(FederatedConfig(**options, load_in_4bit=True, bf16=True))["quantization_config"]
    assert (config.load_in_4bit, config.bnb_4bit_quant_type) == (True, "nf4")
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    args = FederatedConfig(**options, load_in_4bit=True, model_dtype="float16", bnb_4bit_quant_type="fp4")
    config = loading(args)["quantization_config"]
    assert (config.bnb_4bit_compute_dtype, config.bnb_4bit_quant_type) == (torch.float16, "fp4")
    assert loading(FederatedConfig(**options, load_in_8bit=True))["quantization_config"].load_in_8bit


def test_one_of_the_two(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="load_in_4bit and load_in_8bit: a base is loaded in one"):
        FederatedConfig(**models.options(tmp_path, load_in_4bit=True, load_in_8bit=True))


def test_without_bitsandbytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantisation, "find_spec", lambda name: None)
    FederatedConfig(**models.options(tmp_path))
    with pytest.raises(ConfigError, match=r"load_in_8bit: needs bitsandbytes.*pip install 'fedlora_hf\[quantised\]'"):
        FederatedConfig(**models.options(tmp_path, load_in_8bit=True))
