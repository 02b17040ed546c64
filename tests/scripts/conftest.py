"""The modules of the experiment that a test file names in NAMES, and a base model for text copying."""
# SPDX-License-Identifier: Apache-2.0

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

EXPERIMENTS = Path(__file__).resolve().parents[2] / "scripts" / "experiments"


@pytest.fixture(scope="module")
def scripts(request: pytest.FixtureRequest) -> Iterator[dict[str, ModuleType]]:
    """{name: module} of the test file's NAMES, imported as the script imports them, and forgotten afterwards."""
    names = request.module.NAMES
    before = list(sys.path)
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        yield {name: __import__(name) for name in names}
    finally:
        sys.path[:] = before
        for name in (*names, "common"):
            sys.modules.pop(name, None)


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
