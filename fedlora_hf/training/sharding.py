"""A base model sharded over the processes by FSDP 2 or DeepSpeed's ZeRO 3, as `accelerate launch` describes it.

Only what is large and frozen is sharded. Adapters stay whole on every process: they are read and written as ever, other
parts of them may be trained from one client to the next, and their gradients are added up like without sharding.
"""
# SPDX-License-Identifier: Apache-2.0

import os
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method

from fedlora_hf.adapter.slot import AdapterSlot
from fedlora_hf.errors import ConfigError
from fedlora_hf.launch.zero import shard

_REMEDY = "pass --fsdp_version 2 --fsdp_cpu_ram_efficient_loading false to accelerate launch"


def is_sharded(accelerator: Accelerator, zero: dict[str, Any] | None) -> bool:
    """Whether this launch shards the base model."""
    return zero is not None or getattr(accelerator.state, "fsdp_plugin", None) is not None


def prepared(accelerator: Accelerator, slot: AdapterSlot, together: bool, zero: dict[str, Any] | None) -> nn.Module:
    """The slot's model, ready to be trained and evaluated: in mixed precision, and sharded where the launch says so.

    together: whether all processes train each client together; a sharded model needs that. zero: `zero_settings`.
    ConfigError for a launch that cannot be followed.
    """
    model: Any = slot.model
    if is_sharded(accelerator, zero):
        _check(model, together, "FSDP" if zero is None else "DeepSpeed")
        return _by_fsdp(accelerator, slot) if zero is None else _by_zero(accelerator, slot, zero)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ConfigError(
            f"FSDP on {accelerator.num_processes} x {accelerator.device.type}: accelerate shards over 2 or more GPUs "
            "only, and would go on without a word; leave --use_fsdp out"
        )
    return accelerator.prepare_model(model, evaluation_mode=True)


def _by_zero(accelerator: Accelerator, slot: AdapterSlot, zero: dict[str, Any]) -> nn.Module:
    shard(slot.model, slot.modules(), accelerator.device, zero)
    return accelerator.prepare_model(slot.model, evaluation_mode=True)


def _by_fsdp(accelerator: Accelerator, slot: AdapterSlot) -> nn.Module:
    plugin: Any = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ConfigError(f"fsdp_version={plugin.fsdp_version}: only version 2 can leave adapters whole; {_REMEDY}")
    if plugin.cpu_ram_efficient_loading:
        raise ConfigError(f"fsdp_cpu_ram_efficient_loading=true: would leave the adapters empty; {_REMEDY}")
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if accelerator.device.type == "cuda" and here > gpus:
        raise ConfigError(
            f"FSDP with {here} processes on {gpus} GPU: activations and weights would be on different devices; start "
            "one process for each GPU"
        )
    plugin.ignored_modules = [module.to(accelerator.device) for module in slot.modules()]  # sharding moves the others
    # accelerate shards a model only beside an optimizer; ours are made anew for every client, this one for nothing.
    optimizer = torch.optim.SGD(list(slot.parameters()), lr=0.0)
    model: Any
    model, _ = accelerator.prepare(slot.model, optimizer)
    accelerator._optimizers.clear()
    register_fsdp_forward_method(model, "generate")
    return model


def _check(model: Any, together: bool, what: str) -> None:
    if not together:
        raise ConfigError(
            f"{what} with client_parallel=clients: processes that train different clients cannot share one sharded "
            "model; pass --client_parallel data"
        )
    if getattr(model.get_base_model(), "is_quantized", False):
        raise ConfigError(f"{what} with a quantised base: its packed weights are not sharded; use one of the two")
