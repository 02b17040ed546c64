"""Steps: stock PEFT and transformers load what was pushed; fedlora_hf is not imported. Prints what was seen."""
# SPDX-License-Identifier: Apache-2.0

import json
import os
import sys

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

run, repo, tokens = os.environ["LOCAL_RUN"], "alice/stock", torch.arange(8)[None]
shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}


def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


def logits(model):
    with torch.no_grad():
        return model(tokens).logits


def peft_logits(place, **options):
    return logits(PeftModel.from_pretrained(base(), place, **options).eval())


def transformers_logits(**options):
    model = base()
    model.load_adapter(repo, **options)
    return logits(model)


expected, personal = peft_logits(run), peft_logits(f"{run}/clients/ann")
seen = {
    "differ": not torch.allclose(expected, logits(base())) and not torch.allclose(expected, personal),
    "root": torch.equal(peft_logits(repo), expected),
    "revision": torch.equal(peft_logits(repo, revision="round-3"), expected),
    "subfolder": torch.equal(peft_logits(repo, subfolder="clients/ann", revision="round-3"), personal),
    "transformers": torch.equal(transformers_logits(), expected),
    "transformers_subfolder": torch.equal(
        transformers_logits(adapter_kwargs={"subfolder": "clients/ann", "revision": "round-3"}), personal
    ),
    "imported": [name for name in sys.modules if name.startswith("fedlora_hf")],
}
print(json.dumps(seen))  # noqa: T201
