"""Direction/magnitude adapters on a base quantised with bitsandbytes to 4 and 8 bits, on the CPU."""
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from fedlora_hf.dirmag import DirMagLoraConfig, is_dirmag

pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Merge lora module to .-bit linear:UserWarning"),
]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("plain_first", [False, True])
def test_training_saving_and_merging_match_plain_lora(base, tokens, options, fit, tmp_path, bits, plain_first):
    base(hidden=64).save_pretrained(tmp_path / "base")  # a multiple of the 4-bit block

    def quantised():
        config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
        return LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, device_map="cpu")

    if plain_first:
        model = get_peft_model(quantised(), LoraConfig(**options))
        model.add_adapter("split", DirMagLoraConfig(**options))
        model.set_adapter("split")
        model.delete_adapter("default")
    else:
        model = get_peft_model(quantised(), DirMagLoraConfig(**options), adapter_name="split")
    assert is_dirmag(model, "split")
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert type(layer).__name__ == {4: "DirMagLinear4bit", 8: "DirMagLinear8bitLt"}[bits]
    fit(model, tokens, steps=3)
    assert (layer.lora_B["split"].magnitude != 0).any()
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(quantised(), tmp_path / "split")
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, stock(tokens).logits)
        assert torch.equal(model.merge_and_unload()(tokens).logits, stock.merge_and_unload()(tokens).logits)
