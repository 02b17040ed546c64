"""Several clients' local steps in lockstep: one pass over the frozen base for all of them, then a step of each.

What is a client's own stays so: its factors, its order of batches, the number of items its loss is divided by, its
clipping, optimizer, schedule and number of steps are those of `LocalTraining`, so that its update is the one it would
come to alone, up to the rounding of products over other shapes. A client that has taken its steps drops out of the
next pass, and so does one that fails. Nothing may be drawn at random in a pass (training/lockstep_checks.py).
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer

from fedlora_hf.errors import FedLoraError, one_line
from fedlora_hf.training.client_steps import ClientSteps
from fedlora_hf.training.control import Controls
from fedlora_hf.training.joint_batch import joined
from fedlora_hf.training.joint_loss import joint_losses
from fedlora_hf.training.local import LocalResult, StoppedError, cuda_devices, mode_set_once
from fedlora_hf.training.side_by_side import Seats
from fedlora_hf.training.step_log import input_tokens
from fedlora_hf.update import AdapterState
from fedlora_hf.util.seeding import derive_seed

if TYPE_CHECKING:
    from fedlora_hf.training.client_trainer import ClientTrainer

Drawn = tuple[list[dict[str, Any]], Tensor | int | None]  # micro-batches of a step, and its number of items


@dataclass(frozen=True, eq=False)
class Task:
    """What a client brings: the adapter it starts from, and what `LocalTraining` takes of it alone."""

    name: str
    start: AdapterState
    batches: Iterator[list[dict[str, Any]]]
    steps: int
    controls: Controls | None = None
    moments: bytes = b""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a client came to: the adapter as it left it, and the state of its optimizer, where that is kept."""

    result: LocalResult
    state: AdapterState
    moments: bytes


class PassError(Exception):
    """A pass over several clients' batches failed, and it cannot be said whose fault that was."""


@dataclass(eq=False)
class _Learner:
    task: Task
    steps: ClientSteps
    total: Tensor
    taken: int = 0


@dataclass(eq=False)
class Lockstep:
    """The local steps of `tasks`, in the trainer's model, whose own adapter is left as it was.

    parts: what is trained ("A", "B" or parts of them). proximal_mu: of FedProx. done: called with a task's place, and
    its outcome or the exception that ended it alone, as soon as that is known.
    Raises PassError, and StoppedError where a callback has asked for the end; what `done` was told stands.
    """

    trainer: "ClientTrainer"
    tasks: Sequence[Task]
    parts: Sequence[str]
    seed: int
    done: Callable[[int, Outcome | Exception], None]
    proximal_mu: float = 0.0
    learners: dict[int, _Learner] = field(default_factory=dict, init=False)

    def run(self) -> None:
        trainer = self.trainer
        self.seats = Seats(trainer.slot, len(self.tasks))
        try:
            with (
                self.seats.restored(),
                trainer.optimizers_forgotten(),
                torch.random.fork_rng(cuda_devices(trainer.args.device)),
                mode_set_once(trainer.model_wrapped),
            ):
                torch.manual_seed(derive_seed(self.seed, "lockstep"))
                for place in range(len(self.tasks)):
                    self._alone(place, self._begin)
                while self.learners:
                    trainer.check_stop()
                    self._step()
        finally:
            for learner in self.learners.values():
                learner.steps.drop_gradients()

    def _begin(self, place: int) -> None:
        trainer, task = self.trainer, self.tasks[place]
        self.seats.take(place)
        trainer.slot.write(task.start)
        trainer.slot.train_only(self.parts)
        steps = ClientSteps(trainer, self.proximal_mu, task.controls)
        steps.begin(task.steps, task.moments)
        self.learners[place] = _Learner(task, steps, torch.zeros((), device=trainer.args.device))

    def _step(self) -> None:
        """One step of every client that has one left."""
        drawn: dict[int, Drawn] = {}

        def draw(place: int) -> None:
            drawn[place] = self.trainer.step_batches(self.learners[place].task.batches)

        for place in list(self.learners):
            self._alone(place, draw)
        for place in drawn:
            self._turn_to(place)
            self.trainer.step_begins()
        losses = self._gradients(drawn)
        for place in drawn:
            self._alone(place, lambda place: self._take(place, losses[place]))

    def _gradients(self, drawn: dict[int, Drawn]) -> dict[int, Tensor]:
        """Leave every client its gradients; the loss of each one's step."""
        losses = {place: torch.zeros((), device=self.trainer.args.device) for place in drawn}
        for number in range(max((len(batches) for batches, _ in drawn.values()), default=0)):
            members = [place for place, (batches, _) in drawn.items() if number < len(batches)]
            try:
                for place, loss in zip(members, self._pass(members, drawn, number), strict=True):
                    losses[place] += loss
            except FedLoraError:  # what no pass can do, whoever's batches it is given
                raise
            except Exception as error:
                raise PassError(one_line(f"{type(error).__name__}: {error}", 300)) from error
        return losses

    def _pass(self, members: list[int], drawn: dict[int, Drawn], number: int) -> list[Tensor]:
        """Forward and backward of each member's micro-batch of this number; their losses, as training_step has them."""
        trainer, args = self.trainer, self.trainer.args
        batches = [drawn[place][0][number] for place in members]
        for inputs in batches if args.include_num_input_tokens_seen != "no" else ():
            trainer.state.num_input_tokens_seen += input_tokens(inputs, str(args.include_num_input_tokens_seen))
        pad = getattr(trainer.model.config, "pad_token_id", None)
        joint = joined(batches, 0 if pad is None else pad)
        self.seats.together(members, joint.rows)
        trainer.model_wrapped.train()
        for place in members:
            if callable(getattr(self.learners[place].steps.optimizer, "train", None)):
                self.learners[place].steps.optimizer.train()
        losses = joint_losses(trainer, joint, [drawn[place][1] for place in members])
        losses = [
            loss if self._divided(drawn[place][1]) else loss / len(drawn[place][0])
            for place, loss in zip(members, losses, strict=True)
        ]
        # The sum's gradient in one client's factors is that of its own loss.
        trainer.accelerator.backward(torch.stack(losses).sum())
        return [loss.detach() for loss in losses]

    def _divided(self, items: Tensor | int | None) -> bool:
        """Whether a loss is divided by the items of the whole step already, as Trainer sees it."""
        trainer = self.trainer
        # The Trainer of transformers 5.17 does not read the attribute: it goes by the two below alone.
        if hasattr(Trainer, "loss_is_scaled_for_ga") and trainer.loss_is_scaled_for_ga is not None:
            return bool(trainer.loss_is_scaled_for_ga)
        return (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None

    def _take(self, place: int, loss: Tensor) -> None:
        """The client's own step on its gradients; after the last one it is done."""
        learner = self.learners[place]
        self._turn_to(place)
        learner.steps.take(loss)
        learner.total += loss
        learner.taken += 1
        if learner.taken < learner.task.steps:
            return
        steps, count = learner.steps, learner.task.steps
        moments = steps.moments() if self.trainer.args.keep_optimizer else b""
        result = LocalResult(float(learner.total) / count, count, steps.control(count))
        outcome = Outcome(result, self.trainer.slot.read(), moments)
        del self.learners[place]
        self.done(place, outcome)

    def _turn_to(self, place: int) -> None:
        """The model, and what callbacks are told, are this client's."""
        self.seats.take(place)
        self.trainer.client_in_training = self.tasks[place].name
        steps = self.learners[place].steps
        self.trainer.use_optimizer(steps.optimizer, steps.scheduler)

    def _alone(self, place: int, work: Callable[[int], None]) -> None:
        """Do what can fail for one client, and for it alone."""
        known = place in self.learners
        try:
            work(place)
        except StoppedError:
            raise
        except Exception as error:
            if known and place not in self.learners:  # it was done, and `done` could not take it
                raise
            if (learner := self.learners.pop(place, None)) is not None:
                learner.steps.drop_gradients()
            failure = error
        else:
            return
        self.done(place, failure)
