"""What a trainer asks of a model with direction/magnitude adapters: switch parts, write factors, count, resume."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from fedlora_hf.dirmag.layer import DirMagLinear
from fedlora_hf.dirmag.lora import DirMagLayer
from fedlora_hf.dirmag.recipe import PARTS, Recipe, checked_parts, names_in
from fedlora_hf.errors import AdapterError


class Size(NamedTuple):
    """Numbers and their bytes in the dtype they have in the model."""

    numbers: int
    nbytes: int


def is_dirmag(model: nn.Module, adapter: str = "default") -> bool:
    """Whether every factor of the adapter is split into magnitude and direction; False when there is no such one."""
    factors = [factor for _, factor in _factors(model, adapter)]
    return bool(factors) and all(isinstance(factor, DirMagLinear) for factor in factors)


def set_trainable_parts(model: nn.Module, parts: Iterable[str], adapter: str = "default") -> None:
    """Train exactly `parts` of the adapter from now on: frozen parts lose their gradient, values do not change.

    In place and cheap, between phases. Make a new optimizer afterwards: an old one holds the old phase's parameters.
    ConfigError for an unknown part, AdapterError when the adapter is not a direction/magnitude one.
    """
    chosen = checked_parts(parts)
    for name, factor in _dirmag_factors(model, adapter):
        factor.trainable = names_in(name[-1], chosen)
    for layer in (module for module in model.modules() if isinstance(module, DirMagLayer)):
        layer.set_requires_grad(adapter, True)
    cast(dict[str, Recipe], model.peft_config)[adapter].trainable_parts = chosen


def part_sizes(model: nn.Module, adapter: str = "default") -> dict[str, Size]:
    """{part: its size over all modules}, in the order of PARTS."""
    sizes = dict.fromkeys(PARTS, Size(0, 0))
    for key, parameter in _parts(model, adapter):
        part = key.rsplit("lora_", 1)[1]
        sizes[part] = Size(sizes[part].numbers + parameter.numel(), sizes[part].nbytes + parameter.nbytes)
    return sizes


def phase_size(model: nn.Module, parts: Iterable[str], adapter: str = "default") -> Size:
    """What a phase that trains `parts` has to train, send and store for one client."""
    sizes = part_sizes(model, adapter)
    chosen = [sizes[part] for part in checked_parts(parts)]
    return Size(sum(size.numbers for size in chosen), sum(size.nbytes for size in chosen))


def write_factor(factor: nn.Module, weight: Tensor) -> None:
    """Write `weight` into a factor of a LoRA layer, `lora_A[name]` or `lora_B[name]`, plain or split, in place.

    A split factor takes it as canonical parts. AdapterError when the shape is another.
    """
    if isinstance(factor, DirMagLinear):
        factor.write(weight)
        return
    plain = cast(nn.Linear, factor).weight
    if plain.shape != weight.shape:
        raise AdapterError(
            f"weight {tuple(weight.shape)}: the factor is {tuple(plain.shape)}; "
            "write an adapter of the same rank and modules"
        )
    with torch.no_grad():
        plain.copy_(weight)


def native_state(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """{"<module>.lora_A.direction": tensor ...}: copies of the parts as they are, for a resume to the last bit.

    The folded weights on disk forget the directions' lengths and the magnitudes' signs, which an optimizer's state
    goes with. The adapter's name is not in the keys. AdapterError when it is not a direction/magnitude one.
    """
    return {key: parameter.detach().clone() for key, parameter in _parts(model, adapter)}


def load_native_state(model: nn.Module, state: Mapping[str, Tensor], adapter: str = "default") -> None:
    """Put the parts of `native_state` back, in place; AdapterError, and nothing changed, unless keys and shapes fit."""
    parts = dict(_parts(model, adapter))
    odd = sorted(set(parts) ^ set(state))
    odd += [key for key in parts if key in state and parts[key].shape != state[key].shape]
    if odd:
        raise AdapterError(
            f"native state: {odd[0]} is missing, unknown or of another shape; load it into its own model"
        )
    with torch.no_grad():
        for key, parameter in parts.items():
            parameter.copy_(state[key])


def _factors(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    """("<module>.lora_A", factor) and B, of every LoRA layer that has the adapter."""
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            for letter, factors in (("A", layer.lora_A), ("B", layer.lora_B)):
                if adapter in factors:
                    yield f"{name}.lora_{letter}", factors[adapter]


def _dirmag_factors(model: nn.Module, adapter: str) -> list[tuple[str, DirMagLinear]]:
    """The same, all of them split; AdapterError otherwise."""
    if not is_dirmag(model, adapter):
        raise AdapterError(
            f"adapter {adapter!r}: is not, or not in every module, a direction/magnitude adapter; "
            "add it to the model with a DirMagLoraConfig"
        )
    return list(_factors(model, adapter))


def _parts(model: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
    for name, factor in _dirmag_factors(model, adapter):
        for part, parameter in factor.named_parameters():
            yield f"{name}.{part}", parameter
