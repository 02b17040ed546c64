"""A tiny Llama, tokens, and a few steps of training: what the tests of direction/magnitude adapters share."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedlora_hf.dirmag import DirMagLoraConfig

OPTIONS: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def tiny_llama(dtype: torch.dtype = torch.float32, hidden: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, max_position_embeddings=32)).to(dtype)


def train(model: nn.Module, tokens: torch.Tensor, steps: int = 8, lr: float = 2e-2, optimizer: Any = None) -> Any:
    """`steps` AdamW steps in place; gives the optimizer back."""
    if optimizer is None:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    for _ in range(steps):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.fixture
def base() -> Callable[..., LlamaForCausalLM]:
    return tiny_llama


@pytest.fixture
def fit() -> Callable[..., Any]:
    return train


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def options() -> dict[str, Any]:
    return dict(OPTIONS)


@pytest.fixture
def fresh() -> nn.Module:
    """A direction/magnitude adapter as it starts."""
    return get_peft_model(tiny_llama(), DirMagLoraConfig(**OPTIONS))


@pytest.fixture
def trained(fresh: nn.Module, tokens: torch.Tensor) -> nn.Module:
    """The same after some steps: |D| has drifted from 1, and some magnitudes are negative."""
    train(fresh, tokens)
    return fresh
