"""The modules of the experiment that a test file names in NAMES, and a base model for text copying."""
# SPDX-License-Identifier: Apache-2.0

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def scripts(request: pytest.FixtureRequest) -> dict[str, ModuleType]:
    """{name: module} of the test file's NAMES."""
    return {name: importlib.import_module(f"scripts.experiments.{name}") for name in request.module.NAMES}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with a base model that has learned nothing, so that none has to be trained."""
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "cache" / "base-0")
    return tmp_path / "cache"
