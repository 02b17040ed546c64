"""The base model with its adapter."""
# SPDX-License-Identifier: Apache-2.0

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


def build(base: str, rank: int) -> PeftModel:
    """The base model from its folder, and a fresh adapter on it."""
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
