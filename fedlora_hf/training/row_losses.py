"""The loss of every row of a split by itself: several clients' examples go through the model in the same batches."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from fedlora_hf.training.metrics import IGNORED, shared_batches

if TYPE_CHECKING:
    from fedlora_hf.launch.processes import Processes


def row_losses(
    model: nn.Module,
    rows: Any,
    collate: Callable[[list[Any]], dict[str, Any]],
    *,
    task: str,
    batch_size: int,
    processes: "Processes | None" = None,
) -> Tensor:
    """(R, 2) float64 on the CPU: of every row its summed loss in nats, and over how many items: answer tokens
    ("causal_lm") or 1 ("sequence_classification").

    processes: those that work together share out the batches, and all of them get all rows.
    """
    score = _causal if task == "causal_lm" else _class
    device = next(model.parameters()).device
    own, idle = shared_batches(len(rows), batch_size, processes)
    loader: DataLoader[Any] = DataLoader(rows, batch_sampler=own, collate_fn=collate, generator=torch.Generator())  # type: ignore[arg-type]
    like = torch.zeros(2 * len(rows), dtype=torch.float64, device=device)

    def scored() -> Tensor:
        found = torch.zeros(len(rows), 2, dtype=torch.float64, device=device)
        for number, (places, batch) in enumerate(zip(own, loader, strict=True)):
            scores = score(model, {name: tensor.to(device) for name, tensor in batch.items()})
            if number < len(own) - idle:
                found[places.start : places.stop] = scores.to(found.dtype)
        return found.flatten()

    was_training = model.training
    model.eval()
    with torch.no_grad():
        total = scored() if processes is None else processes.total(scored, like)
    model.train(was_training)
    return total.reshape(-1, 2).cpu()


def _causal(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(B, 2): (summed negative log-likelihood, tokens) of the answers; position i predicts token i + 1."""
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1]
    answered = labels != IGNORED
    nats = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    nats[answered] = cross_entropy(logits[answered].float(), labels[answered], reduction="none")
    return torch.stack([nats.double().sum(1), answered.sum(1).double()], 1)


def _class(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    labels = batch.pop("labels")
    nats = cross_entropy(model(**batch).logits.float(), labels, reduction="none").double()
    return torch.stack([nats, torch.ones_like(nats)], 1)
