"""A client's optimizer from one of its rounds to its next: the state (moments, step counts), not the settings.

Without it every round starts with a fresh optimizer, as in FedAvg. With it Adam's moments stand for gradients at the
client's old place, while the adapter starts from the global one: a choice, not a default.
"""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor


def moments_of(optimizer: Any) -> bytes:
    """The optimizer's state as the content of a safetensors file; its keys are "<place of the parameter>.<name>"."""
    tensors = {
        f"{place}.{name}": _tensor(value).detach().cpu().contiguous().clone()
        for place, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
        if isinstance(value, Tensor | int | float)
    }
    return bytes(save(tensors)) if tensors else b""


def restore(optimizer: Any, content: bytes) -> bool:
    """Give a fresh optimizer that state; False, and nothing changed, where it is of other parameters, or unreadable.

    Settings (learning rate, weight decay) stay as they were made.
    """
    try:
        tensors = load(content)
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            place, _, name = key.partition(".")
            state.setdefault(int(place), {})[name] = tensor
    except (SafetensorError, ValueError):
        return False
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if sorted(state) != list(range(len(parameters))):
        return False
    for number, parameter in enumerate(parameters):
        if any(tensor.dim() and tensor.shape != parameter.shape for tensor in state[number].values()):
            return False
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return True


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(float(value))
