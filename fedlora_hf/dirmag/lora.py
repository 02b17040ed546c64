"""Direction/magnitude factors inside PEFT's own LoRA layers, whatever back end those have.

PEFT builds the layer it would build for plain LoRA (dense, bitsandbytes, GPTQ ...); then the two factor modules are
exchanged for `DirMagLinear`, and the layer's class for a subclass that does the same for further adapters and keeps
the frozen parts frozen. Forward, merge, save and load are PEFT's.
"""
# SPDX-License-Identifier: Apache-2.0

import functools
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from fedlora_hf.dirmag.layer import DirMagLinear
from fedlora_hf.dirmag.recipe import Recipe, names_in
from fedlora_hf.errors import AdapterError
from fedlora_hf.util.seeding import derive_seed

_CLASSES: dict[type, type] = {}


class DirMagLayer:
    """Mixed into the class of a stock LoRA layer; `stock_class` is that class."""

    stock_class: type
    lora_A: nn.ModuleDict  # noqa: N815 (PEFT's name)
    lora_B: nn.ModuleDict  # noqa: N815
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """A further adapter on this layer, of either kind."""
        super().update_layer(adapter_name, r, lora_alpha, config=stock_config(config), **kwargs)  # type: ignore[misc]
        if isinstance(config, Recipe):
            self.split_factors(adapter_name, config, kwargs.get("target_name", ""))

    def split_factors(self, adapter: str, recipe: Recipe, target_name: str) -> None:
        """Exchange the adapter's two linear factors for direction/magnitude ones of the same weights."""
        refuse_unsplittable(self, adapter, target_name)
        for name, factors, axis in (("A", self.lora_A, recipe.axis_a), ("B", self.lora_B, recipe.axis_b)):
            plain = cast(nn.Linear, factors[adapter]).weight
            # The layer's name is the same on all clients, so their directions for the zero rows of B are too.
            seed = derive_seed(recipe.direction_seed, "direction", target_name, name)
            factor = DirMagLinear(plain.detach(), axis, seed, names_in(name, recipe.trainable_parts))
            factors[adapter] = factor.requires_grad_(plain.requires_grad)
        self.freeze_rest()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's. On its usual path it reads the weight of each active A once, to learn its dtype.

        Folding the weight for that would be a third of what a split factor costs in a training step.
        """
        usual = not (self.disable_adapters or self.merged or "adapter_names" in kwargs or torch.compiler.is_compiling())
        factors = [self.lora_A[name] for name in self.active_adapters if usual and name in self.lora_A]
        split = [factor for factor in factors if isinstance(factor, DirMagLinear)]
        for factor in split:
            factor.expect_dtype_read(True)
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            for factor in split:
                factor.expect_dtype_read(False)

    def set_adapter(self, adapter_names: str | list[str], *args: Any, **kwargs: Any) -> None:
        super().set_adapter(adapter_names, *args, **kwargs)  # type: ignore[misc]
        self.freeze_rest()

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)  # type: ignore[misc]
        self.freeze_rest()

    def freeze_rest(self) -> None:
        """Every route by which PEFT gives gradients ends here: what the recipe does not train stays frozen."""
        for factor in dirmag_factors(self):
            factor.freeze_rest()

    def __reduce__(self) -> Any:
        """The class is made at run time, so pickle and deepcopy are told how to make it."""
        return _empty_layer, (self.stock_class,), self.__dict__


def dirmag_class(stock_class: type) -> type:
    """The subclass of a stock LoRA layer class, one for each."""
    if stock_class not in _CLASSES:
        fields = {"stock_class": stock_class, "__module__": __name__}
        _CLASSES[stock_class] = type(f"DirMag{stock_class.__name__}", (DirMagLayer, stock_class), fields)
    return _CLASSES[stock_class]


def _empty_layer(stock_class: type) -> DirMagLayer:
    return cast(DirMagLayer, object.__new__(dirmag_class(stock_class)))


def dirmag_factors(layer: Any) -> Iterator[DirMagLinear]:
    """The split factors of a LoRA layer, of all its adapters."""
    for factors in (layer.lora_A, layer.lora_B):
        for factor in factors.values():
            if isinstance(factor, DirMagLinear):
                yield factor


def refuse_unsplittable(layer: Any, adapter: str, target_name: str) -> None:
    """AdapterError unless the adapter on this layer is two linear factors without bias and nothing else."""
    factors = [factors[adapter] for factors in (layer.lora_A, layer.lora_B) if adapter in factors]
    inner = [module for module in layer.modules() if isinstance(module, LoraLayer) and module is not layer]
    linear = [factor for factor in factors if type(factor) is nn.Linear and factor.bias is None]
    if len(linear) != 2 or inner or adapter in getattr(layer, "lora_variant", {}):
        raise AdapterError(
            f"{target_name} ({type(layer.get_base_layer()).__name__}): direction/magnitude LoRA needs plain linear "
            "factors without bias or variant; leave this module out of target_modules and the other options unset"
        )


def stock_config(config: LoraConfig) -> LoraConfig:
    """The plain LoraConfig with the same LoRA fields, so that stock code never meets ours; a plain one is returned."""
    if not isinstance(config, Recipe):
        return config
    stock = object.__new__(LoraConfig)
    stock.__dict__.update({name: value for name, value in vars(config).items() if name not in Recipe.__annotations__})
    stock._custom_modules = None
    return stock


def dispatch(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module:
    """The layer PEFT would make for `target`, made a direction/magnitude one (PEFT's custom module hook)."""
    layer = LoraModel._create_new_module(stock_config(config), adapter_name, target, **kwargs)
    adopt(layer)
    layer.split_factors(adapter_name, config, kwargs.get("target_name", ""))
    return layer


def adopt(layer: Any) -> None:
    """Give a stock LoRA layer the class that knows direction/magnitude adapters; those it has are not changed."""
    if not isinstance(layer, DirMagLayer):
        layer.__class__ = dirmag_class(type(layer))


def _teach_peft() -> None:
    """Let a direction/magnitude adapter be added to a model whose first adapter is plain LoRA.

    PEFT's hook is asked for new layers only; a stock LoRA layer that is there already would make the new adapter a
    plain one without a word. It is adopted first. Nothing changes for configurations that are not ours.
    """
    stock = LoraModel._create_and_replace
    if hasattr(stock, "knows_dirmag"):
        return

    @functools.wraps(stock)
    def create_and_replace(
        self: LoraModel, lora_config: LoraConfig, adapter_name: str, target: Any, *args: Any, **kw: Any
    ) -> None:
        if isinstance(lora_config, Recipe) and isinstance(target, LoraLayer):
            adopt(target)
        stock(self, lora_config, adapter_name, target, *args, **kw)

    create_and_replace.knows_dirmag = True  # type: ignore[attr-defined]
    LoraModel._create_and_replace = create_and_replace  # type: ignore[method-assign]


_teach_peft()
