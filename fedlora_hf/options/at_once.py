"""Options that `clients_at_once` cannot be followed with."""
# SPDX-License-Identifier: Apache-2.0

from enum import Enum
from typing import Any

from fedlora_hf.errors import ConfigError

# Optimizers that step inside the backward pass, which several clients share.
_IN_BACKWARD = ("lomo", "adalomo")


def check_at_once(args: Any) -> None:
    """ConfigError for the first option beside which clients cannot be trained side by side; one line names it."""
    if args.clients_at_once == 1:
        return
    optim = str(args.optim.value if isinstance(args.optim, Enum) else args.optim)
    refused = (
        (args.fp16, "fp16", "one scale of the loss would be every client's; pass --bf16"),
        (args.torch_compile, "torch_compile", "a compiled model does not change adapters between passes"),
        (args.client_timeout is not None, "client_timeout", "the time of a pass is no one client's"),
        (
            args.lora_dropout > 0,
            f"lora_dropout={args.lora_dropout:g}",
            "what is dropped is drawn anew for other shapes",
        ),
        (optim in _IN_BACKWARD or optim.endswith("_layerwise"), f"optim={optim}", "it steps inside the shared pass"),
    )
    for wrong, name, why in refused:
        if wrong:
            raise ConfigError(f"clients_at_once={args.clients_at_once} beside {name}: {why}; leave out one")
