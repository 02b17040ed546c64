"""The checksum of a base model: other weights, names or dtypes are seen; an adapter's parameters are not part of it."""
# SPDX-License-Identifier: Apache-2.0

import models
import pytest
import torch
from torch import nn

from fedlora_hf.adapter import base_fingerprint
from fedlora_hf.adapter.base_fingerprint import base_sha256


def test_the_same_weights_have_the_same_sum_and_others_another() -> None:
    model = models.tiny_llama()
    before = base_sha256(model)
    assert before == base_sha256(models.tiny_llama())
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    assert base_sha256(model) != before
    assert base_sha256(models.tiny_llama().to(torch.bfloat16)) != before


def test_parameters_of_an_adapter_are_left_out() -> None:
    model = nn.ModuleDict({"base": nn.Linear(3, 2), "adapter": nn.Linear(3, 2)})
    own = {id(parameter) for parameter in model["adapter"].parameters()}
    before = base_sha256(model, own)
    nn.init.zeros_(model["adapter"].weight)
    assert base_sha256(model, own) == before
    nn.init.zeros_(model["base"].weight)
    assert base_sha256(model, own) != before


def test_a_large_tensor_is_sampled_from_its_first_byte_to_its_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_fingerprint, "WHOLE", 1024)
    monkeypatch.setattr(base_fingerprint, "PLACE", 16)
    layer = nn.Linear(1000, 10, bias=False)
    before = base_sha256(layer)
    for place in ((0, 0), (9, 999)):
        changed = nn.Linear(1000, 10, bias=False)
        changed.weight.data.copy_(layer.weight.data)
        changed.weight.data[place] += 1
        assert base_sha256(changed) != before
    with torch.no_grad():
        layer.weight.mul_(1.5)
    assert base_sha256(layer) != before
