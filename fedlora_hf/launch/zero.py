"""A base model sharded by DeepSpeed's ZeRO stage 3, as `accelerate launch --use_deepspeed` or `deepspeed` describes it.

DeepSpeed does one thing here: each layer of the large, frozen base is cut up among the processes, and gathered when a
forward or backward pass comes to it. Adapters stay whole, as with FSDP (sharding.py). DeepSpeed's engine is made, for
its hooks, and then left aside: it is for one optimizer of one set of parameters, and here both change with the client.
So accelerate and transformers shall see plain processes (`plain_launch`).
"""
# SPDX-License-Identifier: Apache-2.0

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from accelerate.utils import other
from torch import nn

from fedlora_hf.errors import ConfigError, one_line

logger = logging.getLogger(__name__)
_LAUNCH = "ACCELERATE_USE_DEEPSPEED"
# What a DeepSpeed configuration may say besides, and the option that says it here.
_SAID_HERE = {
    "optimizer": "optim",
    "scheduler": "lr_scheduler_type",
    "bf16": "bf16",
    "fp16": "fp16",
    "gradient_clipping": "max_grad_norm",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
}


def zero_settings(args: Any) -> dict[str, Any] | None:
    """DeepSpeed's `zero_optimization` of stage 3, from the option `deepspeed` or else from the launch's environment.

    None without DeepSpeed, and for the lower stages: they shard gradients and optimizer of what is trained, which is a
    small adapter, and give what plain processes give. ConfigError for what cannot be followed.
    """
    if not args.deepspeed and os.environ.get(_LAUNCH, "false").lower() != "true":
        return None
    from accelerate import DeepSpeedPlugin

    try:
        config: dict[str, Any] = DeepSpeedPlugin(hf_ds_config=args.deepspeed or None).deepspeed_config
    except ValueError as error:
        raise ConfigError(f"DeepSpeed: {one_line(error)}") from None
    _check_options(config, args)
    settings = {name: value for name, value in config["zero_optimization"].items() if value != "auto"}
    if (stage := settings.get("stage", 0)) != 3:
        if os.environ.get("RANK", "0") == "0":
            logger.warning("DeepSpeed ZeRO stage %s: shards nothing of the frozen base; going on without", stage)
        return None
    _check_settings(settings)
    return settings


@contextmanager
def without_deepspeed(settings: object) -> Iterator[None]:
    """Accelerate imports an installed DeepSpeed to ask whether a model is its engine's; not where none can be.

    settings: of ZeRO, None where the run has none.
    """
    asked = other.is_deepspeed_available
    if settings is None:
        other.is_deepspeed_available = lambda: False
    try:
        yield
    finally:
        other.is_deepspeed_available = asked


def _check_options(config: dict[str, Any], args: Any) -> None:
    steps = args.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", "1"))
    for name, option in _SAID_HERE.items():
        own = getattr(args, option) * steps if name == "train_batch_size" else getattr(args, option)
        said = config.get(name, "auto")
        said = said.get("enabled", said) if isinstance(said, dict) else said
        # 1 is what accelerate launch says when nobody did.
        silent = said in (None, "auto", False) or (name == "gradient_accumulation_steps" and said == 1)
        if not silent and said != own:
            raise ConfigError(
                f"DeepSpeed's {name}: --{option} says otherwise, and counts; leave {name} out of DeepSpeed's "
                "configuration"
            )


def _check_settings(settings: dict[str, Any]) -> None:
    if find_spec("deepspeed") is None:
        raise ConfigError("DeepSpeed: is not installed; pip install 'fedlora_hf[deepspeed]'")
    if "LOCAL_RANK" not in os.environ:
        raise ConfigError("DeepSpeed without a launcher: knows of no processes; start with accelerate launch")
    for name, fit in (("offload_optimizer", ("none",)), ("offload_param", ("none", "cpu"))):
        device = (settings.get(name) or {}).get("device", "none")
        if device not in fit:
            raise ConfigError(f"DeepSpeed's {name}: {device} is not supported; pass {' or '.join(fit)}")


@contextmanager
def plain_launch(args: Any) -> Iterator[None]:
    """What is made inside, be it accelerate's or transformers', knows nothing of DeepSpeed."""
    launch, option = os.environ.pop(_LAUNCH, None), args.deepspeed
    args.deepspeed = None
    try:
        yield
    finally:
        args.deepspeed = option
        if launch is not None:
            os.environ[_LAUNCH] = launch


def shard(model: Any, whole: Sequence[nn.Module], device: torch.device, settings: dict[str, Any]) -> None:
    """Cut up the base of a PEFT model among all processes, one parameter after the other, but not what is in `whole`.

    settings: `zero_settings`. ConfigError where DeepSpeed works on another kind of device.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if (own := get_accelerator().device_name()) != device.type:
        raise ConfigError(f"DeepSpeed on {own}, training on {device.type}: set DS_ACCELERATOR={device.type}")
    # A faster all_reduce between CPU processes, which nothing here calls: built for a minute when first used, and
    # waited for without end where an earlier build was broken off.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": settings}
    for module in whole:
        module.to(device)
    base = model.get_base_model()
    with _without(base, whole):
        deepspeed.zero.Init(module=base, config_dict_or_path=config)
        base.to(device)  # what is left whole: its buffers
        deepspeed.initialize(model=base, config=config)


@contextmanager
def _without(model: nn.Module, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Meanwhile `model` has none of these modules in it."""
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if any(child is module for module in modules)
    ]
    for parent, name, _ in places:
        del parent._modules[name]
    try:
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child
