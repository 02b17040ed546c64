"""One client's local training: the steps of one round from the adapter the model holds, and nothing else.

`transformers.Trainer.train()` is not called: run again and again it would repeat one batch order, carry the optimizer
from client to client and collect garbage at every call. Its parts are (compute_loss, training_step, the optimizer and
scheduler factories, gradient accumulation by tokens), so a client's steps are a plain Trainer's steps to the bit.
"""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from fedlora_hf.data.rows import TokenRows
from fedlora_hf.data.tokenize import tokenize_examples
from fedlora_hf.errors import DataError
from fedlora_hf.seeding import derive_seed

if TYPE_CHECKING:
    from fedlora_hf.config import FederatedConfig


@dataclass(frozen=True, eq=False)
class ClientData:
    """One client's tokenised splits; `questions`: the raw test examples with prompt and references, for generation."""

    train: TokenRows
    validation: datasets.Dataset | None = None
    test: datasets.Dataset | None = None
    questions: datasets.Dataset | None = None


def prepare_client(client_id: str, data: Any, tokenizer: Any, args: "FederatedConfig") -> ClientData:
    """A client's data as the trainer takes it (a Dataset, or {"train", "validation", "test"}), ready for the model.

    Examples are as `data.formats.load_examples` makes them, or already tokenised (input_ids and labels).
    Raises DataError for a client without a training example or without a column to train on.
    """
    splits = dict(data) if isinstance(data, Mapping) else {"train": data}
    if not len(splits.get("train") or ()):
        raise DataError(f"client {client_id!r}: 0 training examples; at least 1 is needed; drop it or give it data")
    test = splits.get("test") or None
    if test is not None and args.max_eval_examples is not None:
        test = test.select(range(min(args.max_eval_examples, len(test))))
    questions = None
    if test is not None and "references" in test.column_names and args.task == "causal_lm":
        questions = test.select(range(min(args.generation_examples, len(test))))

    def tokenised(examples: Any) -> Any:
        if not examples or "input_ids" in examples.column_names:
            return examples or None
        needed = ("prompt", "completion") if args.task == "causal_lm" else ("text", "label")
        if not set(needed) <= set(examples.column_names):
            raise DataError(
                f"client {client_id!r}: columns {', '.join(examples.column_names)}; needs {' and '.join(needed)}, or "
                "input_ids and labels; load the data with fedlora_hf.data.formats.load_examples"
            )
        if tokenizer is None:
            raise DataError(f"client {client_id!r}: text without a tokenizer; pass processing_class=tokenizer")
        return tokenize_examples(examples, tokenizer, max_length=args.max_length, task=args.task)

    train = TokenRows(tokenised(splits["train"]))
    return ClientData(train, tokenised(splits.get("validation")), tokenised(test), questions or None)


@dataclass(frozen=True)
class LocalResult:
    """What a client's local training did. train_loss: mean over the steps, of the training loss without any FedProx
    term; steps: optimizer steps taken."""

    train_loss: float
    steps: int


def num_local_steps(args: Any, num_examples: int) -> int:
    """Optimizer steps of a client in one round: local_steps, or local_epochs over its examples, rounded up."""
    if args.local_steps is not None:
        return int(args.local_steps)
    batches = math.ceil(num_examples / args.per_device_train_batch_size)
    return max(1, math.ceil(args.local_epochs * math.ceil(batches / args.gradient_accumulation_steps)))


def local_batches(
    dataset: Sized, collate: Callable[[list[Any]], dict[str, Any]], args: TrainingArguments, seed: int
) -> Iterator[list[dict[str, Any]]]:
    """The micro-batches of one optimizer step after the other, epoch after epoch, for ever.

    The order of epoch e is drawn from (seed, e) alone. As in Trainer, an epoch's last step may have fewer batches.
    """
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
        loader: DataLoader[Any] = DataLoader(
            dataset,  # type: ignore[arg-type]
            batch_size=args.per_device_train_batch_size,
            shuffle=True,
            generator=generator,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
        )
        group: list[dict[str, Any]] = []
        for batch in loader:
            group.append(batch)
            if len(group) == args.gradient_accumulation_steps:
                yield group
                group = []
        if group:
            yield group
        epoch += 1


def train_locally(
    trainer: Trainer, batches: Iterator[list[dict[str, Any]]], steps: int, *, seed: int, proximal_mu: float = 0.0
) -> LocalResult:
    """Take `steps` optimizer steps on the trainable parameters of `trainer.model`, in place.

    The optimizer and scheduler are fresh. Dropout is drawn from `seed`; the global generator is left as it was.
    proximal_mu: FedProx (Li et al. 2020, arXiv 1812.06127), mu / 2 * |w - w_start|^2 added to the loss; its gradient
    mu * (w - w_start) is added directly, which is the same and costs no graph.
    """
    args, accelerator, model = trainer.args, trainer.accelerator, trainer.model_wrapped
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in parameters] if proximal_mu else []
    trainer.optimizer = trainer.lr_scheduler = None
    optimizer = trainer.create_optimizer()
    scheduler = trainer.create_scheduler(num_training_steps=steps, optimizer=optimizer)
    if accelerator.scaler is not None:
        trainer.optimizer = optimizer = accelerator.prepare_optimizer(optimizer)
    total = torch.zeros((), device=args.device)
    with torch.random.fork_rng(devices=_cuda_devices(args.device), enabled=True), _mode_set_once(model):
        torch.manual_seed(derive_seed(seed, "dropout"))
        for _ in range(steps):
            micro_batches = next(batches)
            micro_batches, num_items = trainer.get_batch_samples(iter(micro_batches), len(micro_batches), args.device)
            trainer.current_gradient_accumulation_steps = len(micro_batches)
            trainer.control = trainer.callback_handler.on_step_begin(args, trainer.state, trainer.control)
            for inputs in micro_batches:
                total += trainer.training_step(model, inputs, num_items)
            for parameter, origin in zip(parameters, start, strict=bool(start)):
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - origin, alpha=proximal_mu)
            if args.max_grad_norm and args.max_grad_norm > 0:
                accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            trainer.state.global_step += 1
            trainer.control = trainer.callback_handler.on_step_end(args, trainer.state, trainer.control)
    # The accelerator would otherwise collect every client's optimizer for as long as the process lives.
    accelerator._optimizers.clear()
    trainer.optimizer = trainer.lr_scheduler = None
    return LocalResult(train_loss=float(total) / steps, steps=steps)


@contextmanager
def _mode_set_once(model: nn.Module) -> Iterator[None]:
    """`model.train()` passes at once while the model is in that mode: training_step asks for it at every step, and it
    would walk over all modules. A callback that evaluates changes the mode, and changes it back, as ever."""
    walk = model.train
    model.train = lambda mode=True: model if model.training == mode else walk(mode)  # type: ignore[method-assign]
    try:
        walk()
        yield
    finally:
        del model.train


def _cuda_devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
