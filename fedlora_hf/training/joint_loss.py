"""The loss of several clients' rows in one pass: for each client what the model, or the run, would take of it alone.

A model of transformers calls its own `loss_function`; in its place stands one that calls it once for each client, on
the client's own rows and length, with the client's own number of items.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fedlora_hf.errors import ConfigError
from fedlora_hf.training.joint_batch import Joint

if TYPE_CHECKING:
    from fedlora_hf.training.client_trainer import ClientTrainer

# What the loss functions of transformers are given by place, where they are.
_WORDS = ("logits", "labels", "vocab_size")
Items = Sequence[Tensor | int | None]


def joint_losses(trainer: "ClientTrainer", joint: Joint, items: Items) -> list[Tensor]:
    """One loss a client, as `Trainer.compute_loss` takes it of the client's batch alone.

    items: number of items in each client's whole step, where the loss is divided by it. ConfigError for a model whose
    loss cannot be taken client by client.
    """
    batch: dict[str, Any] = trainer._prepare_inputs(joint.batch)
    with trainer.compute_loss_context_manager():
        if trainer.label_smoother is not None or trainer.compute_loss_func is not None:
            labels = batch.pop("labels")
            logits = trainer.model_wrapped(**batch).logits
            return [_own(trainer, *part) for part in zip(*_cut(joint, logits, labels), items, strict=True)]
        base = trainer.model.get_base_model()
        split = _Split(base.loss_function, joint, items if trainer.model_accepts_loss_kwargs else [None] * len(items))
        with _loss_function(base, split):
            outputs = trainer.model_wrapped(**batch)
    loss = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
    if split.total is None or loss.data_ptr() != split.total.data_ptr():
        raise ConfigError(
            f"clients_at_once: {type(base).__name__} makes its loss of more than its loss_function, so clients' losses "
            "cannot be told apart; leave clients_at_once out"
        )
    return split.losses


def _own(trainer: "ClientTrainer", logits: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
    outputs = CausalLMOutput(logits=logits)
    if trainer.compute_loss_func is not None:
        loss: Tensor = trainer.compute_loss_func(outputs, labels, num_items_in_batch=items)
        return loss
    smoother: Any = trainer.label_smoother
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    shift = {"shift_labels": True} if trainer.model.get_base_model()._get_name() in names else {}
    smoothed: Tensor = smoother(outputs, labels, num_items_in_batch=items, **shift)
    return smoothed


class _Split:
    """A loss function that gives the sum of one loss a client, and keeps them."""

    def __init__(self, loss_function: Callable[..., Tensor], joint: Joint, items: Items) -> None:
        self.loss_function, self.joint, self.items = loss_function, joint, items
        self.losses: list[Tensor] = []
        self.total: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        given = dict(zip(_WORDS, args, strict=False)) | kwargs
        parts = zip(*_cut(self.joint, given.pop("logits"), given.pop("labels")), self.items, strict=True)
        for place, (logits, labels, items) in enumerate(parts):
            first = place * self.joint.each
            own = slice(first, first + self.joint.shapes[place][0])
            more = {name: value[own] if self._by_row(value) else value for name, value in given.items()}
            if items is not None:
                more["num_items_in_batch"] = items
            self.losses.append(self.loss_function(logits=logits, labels=labels, **more))
        self.total = torch.stack(self.losses).sum()
        return self.total

    def _by_row(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 0 and len(value) == self.joint.rows


def _cut(joint: Joint, logits: Tensor, labels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Each client's own rows, and of what has a value a token its own length."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for place, (rows, length) in enumerate(joint.shapes):
        first = place * joint.each
        for own, tensor in zip(found, (logits, labels), strict=True):
            part = tensor[first : first + rows]
            own.append(part[:, :length].contiguous() if labels.dim() == 2 else part)
    return found


@contextmanager
def _loss_function(base: Any, instead: Callable[..., Tensor]) -> Iterator[None]:
    before = base.__dict__.get("_loss_function")
    base.loss_function = instead
    try:
        yield
    finally:
        del base._loss_function
        if before is not None:
            base.loss_function = before
