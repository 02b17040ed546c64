"""Several adapters scored on one split in one pass over the base: each batch is there once for every adapter."""
# SPDX-License-Identifier: Apache-2.0

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from fedlora_hf.adapter.slot import AdapterSlot, set_frozen
from fedlora_hf.data.tokenize import IGNORED
from fedlora_hf.training.heads import answered_logits
from fedlora_hf.training.metrics import loss_by_owner
from fedlora_hf.training.side_by_side import FixedGroup, HeadGroup, Rows
from fedlora_hf.update import AdapterState

if TYPE_CHECKING:
    from fedlora_hf.training.scorer import Scorer


def losses_of_each(scorer: "Scorer", states: Sequence[AdapterState], dataset: Any) -> list[float]:
    """The loss of each adapter on a tokenised split, as `Scorer.metrics` has it, up to rounding; NaN without labels."""
    sums = [rows.sum(0).tolist() for rows in row_losses_of_each(scorer, states, dataset)]
    return [nats / items if items else math.nan for nats, items in sums]


def owners_losses(
    scorer: "Scorer", states: Iterable[AdapterState], rows: Sequence[Any], owners: Sequence[str]
) -> Iterator[dict[str, float]]:
    """Of each adapter {owner: its loss on the owner's rows}, see `Scorer.losses`; `clients_at_once` adapters are taken
    from `states`, and through the model, together."""
    size = scorer.args.clients_at_once
    if size == 1:
        yield from (scorer.losses(state, rows, owners) for state in states)
        return
    waiting = iter(states)
    while some := list(islice(waiting, size)):
        yield from (loss_by_owner(found, owners) for found in row_losses_of_each(scorer, some, rows))


def row_losses_of_each(scorer: "Scorer", states: Sequence[AdapterState], dataset: Any) -> list[Tensor]:
    """For each adapter (rows, 2) float64 on the CPU: summed nats of each example of the split, and how many labels.

    `clients_at_once` adapters, of any ranks, go through the model together.
    """
    size, found = scorer.args.clients_at_once, []
    for first in range(0, len(states), size):
        found += _side_by_side(scorer, states[first : first + size], dataset)
    return found


def _side_by_side(scorer: "Scorer", states: Sequence[AdapterState], dataset: Any) -> list[Tensor]:
    set_frozen(scorer.slot.model, None)
    model, count, rows = scorer.model, len(states), Rows(range(len(states)), len(states))
    device = next(model.parameters()).device
    # A loader without a generator of its own draws from the global one, even when it shuffles nothing.
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=scorer.args.per_device_eval_batch_size,
        collate_fn=scorer.collate,
        generator=torch.Generator(),
    )
    parts: list[list[Tensor]] = [[] for _ in states]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _standing(scorer.slot, states, rows):
            for batch in loader:
                batch = {
                    name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()
                }
                labels = batch.pop("labels")
                copies = {name: _repeated(value, count) for name, value in batch.items()}
                for own, part in zip(parts, _by_row(model, copies, labels, count), strict=True):
                    own.append(part)
    finally:
        model.train(was_training)
    return [torch.cat(own).cpu() if own else torch.zeros(0, 2, dtype=torch.float64) for own in parts]


def _repeated(value: Any, count: int) -> Any:
    return value.repeat(count, *[1] * (value.dim() - 1)) if isinstance(value, Tensor) and value.dim() else value


def _by_row(model: nn.Module, copies: dict[str, Any], labels: Tensor, count: int) -> list[Tensor]:
    """For each adapter (rows, 2): summed negative log-likelihood of a row's labels, and how many it has.

    copies: the batch without its labels, once for each adapter. Position i predicts token i + 1.
    """
    if labels.dim() == 2:
        labels = labels[:, 1:]
        answered = labels != IGNORED
        logits = answered_logits(model, copies, answered.repeat(count, 1))
    else:
        labels = labels[:, None]
        answered = torch.ones_like(labels, dtype=torch.bool)
        logits = model(**copies).logits
    wanted, found = labels[answered], []
    for part in logits.view(count, len(wanted), logits.shape[-1]):
        nats = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
        nats[answered] = cross_entropy(part.float(), wanted, reduction="none").double()
        found.append(torch.stack([nats.sum(1), answered.sum(1).double()], dim=1))
    return found


@contextmanager
def _standing(slot: AdapterSlot, states: Sequence[AdapterState], rows: Rows) -> Iterator[None]:
    """The states' factors and whole tensors stand in the model meanwhile; the slot's own come back untouched."""
    own = slot.modules()
    instead = [*_factors(slot, states, rows), *_heads(slot, states, rows)]
    try:
        _put(slot, instead)
        yield
    finally:
        _put(slot, own)


def _put(slot: AdapterSlot, modules: Sequence[nn.Module]) -> None:
    for place, module in zip(slot.places(), modules, strict=True):
        place[slot.name] = module


def _factors(slot: AdapterSlot, states: Sequence[AdapterState], rows: Rows) -> Iterator[nn.Module]:
    """A and B of every layer, padded with zeros to the largest rank that any of the states has there."""
    for module, layer in slot.layers.items():
        scale, rank = layer.scaling[slot.name], max(state[module].rank for state in states)
        padded = [state[module].rescaled(scale).padded(rank) for state in states]
        like = next(layer.lora_A[slot.name].parameters())
        yield FixedGroup(torch.stack([factors.A for factors in padded]).to(like), rows)
        yield FixedGroup(torch.stack([factors.B for factors in padded]).to(like), rows)


def _heads(slot: AdapterSlot, states: Sequence[AdapterState], rows: Rows) -> Iterator[nn.Module]:
    for path, wrapper in slot.wrappers.items():
        copies = []
        for state in states:
            head = copy.deepcopy(wrapper.modules_to_save[slot.name])
            for name, tensor in head.state_dict(keep_vars=True).items():
                if f"{path}.{name}" in state.extras:
                    tensor.data.copy_(state.extras[f"{path}.{name}"])
            copies.append(head)
        yield HeadGroup(copies, rows)
