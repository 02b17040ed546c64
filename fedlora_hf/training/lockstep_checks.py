"""What of a model or a trainer cannot go through clients side by side: refused before anything is trained."""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

from torch import nn
from transformers import Trainer

from fedlora_hf.errors import ConfigError

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def check_lockstep(trainer: Any) -> None:
    """ConfigError, one line, for what `clients_at_once` cannot be followed with; nothing for one client at a time."""
    count = trainer.args.clients_at_once
    if count == 1:
        return
    base = trainer.model.get_base_model()
    reason = _own_steps(type(trainer)) or drawing(base) or _shared(base)
    if reason is not None:
        raise ConfigError(f"clients_at_once={count}: {reason}; leave clients_at_once out")


def _own_steps(kind: type) -> str | None:
    for name in ("compute_loss", "training_step"):
        if getattr(kind, name) is not getattr(Trainer, name):
            return f"{kind.__name__}.{name} is a subclass's own, which takes one client's batch"
    return None


def drawing(base: nn.Module) -> str | None:
    """Which part of a model draws at random while it trains: clients side by side would not draw what each does."""
    for path, module in base.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            if module.p > 0:
                return f"{path} drops out {module.p:g} of its input, drawn anew for other shapes"
            continue
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float) and value > 0:
                return f"{path or type(module).__name__}.{name}={value:g} is drawn anew for other shapes"
    return None


def _shared(base: nn.Module) -> str | None:
    """Which part of a model lets the rows of a batch see each other, or hides whose they are."""
    for path, module in base.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return f"{path} normalises over the batch, so clients would see each other"
        if type(module).__name__ == "Linear8bitLt":  # of bitsandbytes, which need not be installed
            return f"{path} is in 8 bits, whose outlier columns are found over the batch; 4 bits can be followed"
    config: Any = getattr(base, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in _EXPERTS:
        if (count := getattr(text, name, None)) and isinstance(count, int) and count > 1:
            return f"{name}={count}: experts are given tokens without saying whose they are"
    if not hasattr(type(base), "loss_function"):
        return f"{type(base).__name__} has no loss_function of transformers to be called client by client"
    return None
