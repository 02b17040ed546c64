"""What a client's local steps need of the Trainer: all that they change of it is changed here."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from fedlora_hf.launch.processes import Processes
from fedlora_hf.training.local import StoppedError
from fedlora_hf.training.step_log import MAX_HISTORY, StepLog, input_tokens

# Optimizers that are made of parameters alone.
LISTED = ("adamw_torch", "adamw_torch_fused")


class _Listed:
    """A model whose trainable parameters are known: Trainer asks for them twice, and walks over the model each time."""

    def __init__(self, model: nn.Module, trained: Sequence[tuple[str, nn.Parameter]]) -> None:
        self._model, self._trained = model, trained

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self._trained)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class StepTrainer(Trainer):
    """A Trainer that lends its parts, optimizer step by optimizer step, to `LocalTraining`."""

    model: Any
    processes: Processes
    step_log: StepLog
    obeys_stop: bool
    client_in_training = ""
    _decay_names: list[str] | None = None

    def new_optimizer(self, steps: int, trained: Sequence[tuple[str, nn.Parameter]]) -> tuple[Any, Any]:
        """A new (optimizer, scheduler) over what is trainable now, for so many steps; see `optimizers_forgotten`.

        trained: these parameters, by their names in the wrapped model.
        """
        self.optimizer = self.lr_scheduler = None
        # A create_optimizer of somebody's own, and an optimizer that is given the model, see the model itself.
        plain = type(self).create_optimizer is Trainer.create_optimizer and self.args.optim in LISTED
        known = plain and self.model_wrapped is self.model
        optimizer = self.create_optimizer(*([_Listed(self.model, trained)] if known else []))
        scheduler = self.create_scheduler(num_training_steps=steps, optimizer=optimizer)
        if self.accelerator.scaler is not None:
            self.optimizer = optimizer = self.accelerator.prepare_optimizer(optimizer)
        return optimizer, scheduler

    def use_optimizer(self, optimizer: Any, scheduler: Any) -> None:
        """What callbacks are told of from now on."""
        self.callback_handler.optimizer, self.callback_handler.lr_scheduler = optimizer, scheduler

    @contextmanager
    def optimizers_forgotten(self) -> Iterator[None]:
        """None of the optimizers made inside is left afterwards."""
        try:
            yield
        finally:
            self.callback_handler.optimizer = self.callback_handler.lr_scheduler = None
            # The accelerator would otherwise collect every client's optimizer for as long as the process lives.
            self.accelerator._optimizers.clear()
            self.optimizer = self.lr_scheduler = None

    def step_batches(self, batches: Iterator[list[dict[str, Any]]]) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """(this process's micro-batches of the next step, the number of items in the step, over all processes)."""
        device, processes = self.args.device, self.processes
        drawn: list[Any] = []

        def counts() -> Tensor:
            own = next(batches)
            drawn[:] = self.get_batch_samples(iter(own), len(own), device)
            return torch.tensor([len(own), float(drawn[1] or 0)], device=device, dtype=torch.float64)

        if not processes.together:
            counts()
            self.current_gradient_accumulation_steps = len(drawn[0])
            return drawn[0], drawn[1]
        number, items = processes.total(counts, torch.zeros(2, device=device, dtype=torch.float64))
        self.current_gradient_accumulation_steps = int(number)
        return drawn[0], None if drawn[1] is None else items.float()

    def backward(self, micro_batches: list[dict[str, Any]], num_items: Tensor | int | None) -> Tensor:
        """Forward and backward of a step's micro-batches on this process; the sum of their losses."""
        loss = torch.zeros((), device=self.args.device)
        for inputs in micro_batches:
            if self.args.include_num_input_tokens_seen != "no":
                self.state.num_input_tokens_seen += input_tokens(inputs, str(self.args.include_num_input_tokens_seen))
            loss += self.training_step(self.model_wrapped, inputs, num_items)
        return loss

    def step_begins(self) -> None:
        """Tell the callbacks."""
        self.tell("on_step_begin")

    def tell(self, event: str) -> None:
        """Tell the callbacks of an event."""
        self.control = getattr(self.callback_handler, event)(self.args, self.state, self.control)

    def check_stop(self) -> None:
        """StoppedError when a callback has asked for the end of the run, of a step that would be one of a round."""
        if self.obeys_stop and self.processes.agreed(self.control.should_training_stop):
            raise StoppedError

    def step_ended(self, loss: Tensor, grad_norm: Any, rate: float) -> None:
        """Count the step, tell the callbacks and, every logging_steps, what the steps came to."""
        self.state.global_step += 1
        self.step_log.add(self.client_in_training, loss)
        self.tell("on_step_end")
        if self.control.should_log:
            norm = {} if grad_norm is None else {"grad_norm": float(grad_norm)}
            self.log({**self.step_log.take(), **norm, "learning_rate": rate})

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs, *args, **kwargs)
        del self.state.log_history[:-MAX_HISTORY]

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As Trainer's, but found once: a client's optimizer does not wait for a walk over all modules."""
        if self._decay_names is None:
            self._decay_names = super().get_decay_parameter_names(model)
        return self._decay_names
