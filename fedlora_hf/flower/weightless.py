"""A base model's shape without its weights: what a server needs to know of it, in no memory to speak of."""
# SPDX-License-Identifier: Apache-2.0

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from fedlora_hf.config import FederatedConfig
from fedlora_hf.errors import ConfigError, one_line


def weightless_base(args: FederatedConfig) -> nn.Module:
    """The model of `model_name_or_path` from its config.json alone; every tensor is one zero, seen many times.

    An adapter made on it is the one made on the real model, to the bit: it depends on names, shapes and the dtype. Of a
    classification head, which `args.labels` give a row each, it has the shape alone.
    Raises ConfigError for a model that is not there.
    """
    name = str(args.model_name_or_path)
    dtype = {} if args.model_dtype == "auto" else {"dtype": args.model_dtype}  # without: what config.json says
    classes = {} if args.task == "causal_lm" else {"num_labels": len(args.labels or ())}
    kind = AutoModelForCausalLM if args.task == "causal_lm" else AutoModelForSequenceClassification
    try:
        config = AutoConfig.from_pretrained(name, revision=args.model_revision, **classes)
        with torch.device("meta"):
            model = kind.from_config(config, **dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"model_name_or_path={name!r}: {one_line(error, 200)}; give a folder or a Hub id of a model"
        ) from None
    model.name_or_path = name  # PEFT writes it into adapter_config.json
    return emptied(model)


def emptied(model: nn.Module) -> nn.Module:
    """`model` with every parameter and buffer replaced, in place, by a single zero expanded to its shape."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                zero = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                module._parameters[name] = nn.Parameter(zero, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros((), dtype=buffer.dtype).expand(buffer.shape)
    return model
