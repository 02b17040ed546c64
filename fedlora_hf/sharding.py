"""A base model sharded over the processes by FSDP 2, as `accelerate launch --use_fsdp` describes it.

Only what is large and frozen is sharded. Adapters stay whole on every process: they are read and written as ever, other
parts of them may be trained from one client to the next, and their gradients are added up like without FSDP.
"""
# SPDX-License-Identifier: Apache-2.0

import os
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method

from fedlora_hf.adapters import AdapterSlot
from fedlora_hf.errors import ConfigError

_REMEDY = "pass --fsdp_version 2 --fsdp_cpu_ram_efficient_loading false to accelerate launch"


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether this launch shards the base model."""
    return getattr(accelerator.state, "fsdp_plugin", None) is not None


def prepared(accelerator: Accelerator, slot: AdapterSlot, together: bool) -> nn.Module:
    """The slot's model, ready to be trained and evaluated: in mixed precision, and sharded where the launch says so.

    together: whether all processes train each client together; a sharded model needs that. ConfigError for a launch
    that cannot be followed.
    """
    model: Any = slot.model
    if not is_sharded(accelerator):
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise ConfigError(
                f"FSDP on {accelerator.num_processes} x {accelerator.device.type}: accelerate shards over 2 or more "
                "GPUs only, and would go on without a word; leave --use_fsdp out"
            )
        return accelerator.prepare_model(model, evaluation_mode=True)
    _check(accelerator.state.fsdp_plugin, model, together)
    whole = [module.to(accelerator.device) for module in slot.modules()]  # sharding moves the others
    accelerator.state.fsdp_plugin.ignored_modules = whole
    # accelerate shards a model only beside an optimizer; ours are made anew for every client, this one for nothing.
    optimizer = torch.optim.SGD(list(slot.parameters()), lr=0.0)
    model, _ = accelerator.prepare(model, optimizer)
    accelerator._optimizers.clear()
    register_fsdp_forward_method(model, "generate")
    return model


def _check(plugin: Any, model: Any, together: bool) -> None:
    if not together:
        raise ConfigError(
            "FSDP with client_parallel=clients: processes that train different clients cannot share one sharded model; "
            "pass --client_parallel data"
        )
    if plugin.fsdp_version != 2:
        raise ConfigError(f"fsdp_version={plugin.fsdp_version}: only version 2 can leave adapters whole; {_REMEDY}")
    if plugin.cpu_ram_efficient_loading:
        raise ConfigError(f"fsdp_cpu_ram_efficient_loading=true: would leave the adapters empty; {_REMEDY}")
    if getattr(model.get_base_model(), "is_quantized", False):
        raise ConfigError("FSDP with a quantised base: its packed weights are not sharded; use one of the two")
