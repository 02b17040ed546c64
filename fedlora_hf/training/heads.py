"""Logits where an answer is predicted, and nowhere else.

A vocabulary of 50,000 words makes a position's logits a hundred times its hidden state, and most positions are prompt.
"""
# SPDX-License-Identifier: Apache-2.0

import sys
from typing import Any

import torch
from torch import Tensor, nn


def answered_logits(model: nn.Module, batch: dict[str, Tensor], answered: Tensor) -> Tensor:
    """Logits at the answered positions, (number of them, vocabulary), in the order of the batch.

    answered: (batch, length - 1), whether position i predicts an answer. Where the model takes a mask of positions,
    its head is applied to these alone; elsewhere to all.
    """
    if takes_mask(model):
        last = answered.new_zeros(len(answered), 1)
        logits: Tensor = model(**batch, logits_to_keep=torch.cat([answered, last], 1)).logits
        return logits
    logits = model(**batch).logits[:, :-1]
    return logits[answered]


def takes_mask(model: Any) -> bool:
    """Whether a model selects hidden states by a mask before its head, and what follows its head (a scale, a cap on
    the logits) looks at each by itself: those whose `forward` is in a file of transformers with `slice_logits_to_keep`,
    which 5.21 brought.

    One that is compiled is left as it is: it would be compiled again for every number of positions.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(model, "_compiled_call_impl", None) is not None or not hasattr(base, "config"):
        return False
    file = type(base).forward.__module__  # decorated or not; a subclass with a forward of its own is elsewhere
    known = file.startswith("transformers.models.") and hasattr(sys.modules[file], "slice_logits_to_keep")
    return known and not getattr(base.config, "is_encoder_decoder", False)
