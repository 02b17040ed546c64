"""One client's local training: the steps of one round from the adapter the model holds, and nothing else.

`transformers.Trainer.train()` is not called: run again and again it would repeat one batch order, take the optimizer
from client to client and collect garbage at every call. Its parts are (compute_loss, training_step, the optimizer and
scheduler factories, gradient accumulation by tokens), so a client's steps are a plain Trainer's steps to the bit.
"""
# SPDX-License-Identifier: Apache-2.0

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count as counting
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from fedlora_hf.errors import ClientTimeoutError, one_line
from fedlora_hf.launch.alarm import alarm
from fedlora_hf.training.client_steps import ClientSteps
from fedlora_hf.training.control import Controls
from fedlora_hf.training.metrics import IGNORED
from fedlora_hf.util.disk import is_disk_trouble
from fedlora_hf.util.seeding import derive_seed

if TYPE_CHECKING:
    from fedlora_hf.training.client_trainer import ClientTrainer

# Options of a loader that are TrainingArguments' with "dataloader_" before them, and what they are unless given.
_LOADER: dict[str, Any] = {
    "num_workers": 0,
    "persistent_workers": False,
    "prefetch_factor": None,
    "multiprocessing_context": None,
    "in_order": True,
}


@dataclass(frozen=True)
class LocalResult:
    """What a client's local training did. train_loss: mean over the steps, of the training loss without any FedProx
    term; steps: optimizer steps taken; control: the client's next control variate, of SCAFFOLD."""

    train_loss: float
    steps: int
    control: Mapping[str, Tensor] = field(default_factory=dict)


def num_local_steps(args: Any, num_examples: int, processes: int = 1) -> int:
    """Optimizer steps of a client in one round: local_steps, or local_epochs over its examples, rounded up.

    processes: how many share out the client's batches. As in Trainer, a step then has so many times the examples.
    """
    if args.local_steps is not None:
        return int(args.local_steps)
    batches = num_batches(args, num_examples)
    return max(1, math.ceil(args.local_epochs * math.ceil(batches / (args.gradient_accumulation_steps * processes))))


def num_batches(args: TrainingArguments, num_examples: int) -> int:
    """Batches of an epoch; dataloader_drop_last leaves a smaller last one out, unless it is the only one."""
    size = args.per_device_train_batch_size
    if getattr(args, "dataloader_drop_last", False):
        return max(1, num_examples // size)
    return math.ceil(num_examples / size)


def trained_rows(args: Any, num_examples: int) -> float:
    """Rows that a client's steps of one round see, on average, however many processes share them out."""
    steps_an_epoch = math.ceil(num_batches(args, num_examples) / args.gradient_accumulation_steps)
    most = num_examples
    if getattr(args, "dataloader_drop_last", False):
        most = min(most, num_batches(args, num_examples) * args.per_device_train_batch_size)
    return num_local_steps(args, num_examples) * most / steps_an_epoch


def local_batches(
    dataset: Sized,
    collate: Callable[[list[Any]], dict[str, Any]],
    args: TrainingArguments,
    seed: int,
    *,
    share: tuple[int, int] = (0, 1),
    even: bool = False,
) -> Iterator[list[dict[str, Any]]]:
    """The micro-batches of one optimizer step after the other, epoch after epoch, for ever.

    The order of epoch e is drawn from (seed, e) alone. As in Trainer, an epoch's last step may have fewer batches.
    share: (number, count) of this process among those that share out the batches. It gets every count-th micro-batch
        of a step that has gradient_accumulation_steps for each: together they see what one process sees that
        accumulates count times as many. even: where an epoch ends before its turn it gets a batch without labels.
    """
    number, count = share
    per_step = args.gradient_accumulation_steps * count
    total = num_batches(args, len(dataset))
    order = _Order(dataset, args, seed, total, number, count)
    loader: DataLoader[Any] = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=order,
        generator=torch.Generator().manual_seed(seed),  # of the workers' own seeds
        collate_fn=collate,
        pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
        **{name: getattr(args, f"dataloader_{name}", usual) for name, usual in _LOADER.items()},
    )
    for epoch in counting():
        order.epoch = epoch
        batches = iter(loader)
        for first in range(0, total, per_step):
            on_all = min(per_step, total - first)
            own = list(islice(batches, len(range(number, on_all, count))))
            if even and len(own) < math.ceil(on_all / count):
                own.append(_without_labels(collate([dataset[0]])))  # type: ignore[index]
            yield own


@dataclass
class _Order(Sampler[list[int]]):
    """The batches number, number + count, number + 2 count ... of an epoch, as lists of examples' numbers."""

    dataset: Any
    args: Any
    seed: int
    total: int
    number: int
    count: int
    epoch: int = 0

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", self.epoch))
        # The first number is not for the order: a loader with this generator would take it for its workers.
        torch.empty((), dtype=torch.int64).random_(generator=generator)
        batches = BatchSampler(self._examples(generator), self.args.per_device_train_batch_size, drop_last=False)
        yield from islice(batches, self.number, self.total, self.count)

    def _examples(self, generator: torch.Generator) -> Sampler[int]:
        strategy = getattr(self.args, "train_sampling_strategy", "random")
        if strategy == "sequential":
            return SequentialSampler(self.dataset)
        if strategy == "group_by_length":
            size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
            lengths = getattr(self.dataset, "lengths", None)
            lengths = lengths or [len(self.dataset[place]["input_ids"]) for place in range(len(self.dataset))]
            return LengthGroupedSampler(size, lengths=lengths, generator=generator)
        return RandomSampler(self.dataset, generator=generator)


def _without_labels(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}


# Seconds more that a step may take once the time is over: an ordinary slow one then says itself how slow it was.
GRACE = 1.0


@dataclass(eq=False)
class LocalTraining:
    """One client's steps of a round, on the trainable parameters of the trainer's model, in place.

    batches: of one step after the other, see `local_batches`. Dropout is drawn from `seed`; the global generator is
    left as it was. Where processes work together each takes its own `batches`; losses have the whole step's denominator
    and gradients are added up, so every process takes the same step.
    proximal_mu: FedProx (Li et al. 2020, arXiv 1812.06127), mu / 2 * |w - w_start|^2 added to the loss; its gradient
    mu * (w - w_start) is added directly, which is the same and costs no graph.
    controls: SCAFFOLD's control variates, added to the gradients before anything else is; None: none.
    timeout: seconds after which the client is given up: ClientTimeoutError. They are looked at after every step; GRACE
    seconds later a step that hangs is broken off too (where processes work together, while it waits for its batch).
    moments: state that the optimizer goes on with (moments.py); none is a fresh one.
    """

    trainer: "ClientTrainer"
    batches: Iterator[list[dict[str, Any]]]
    steps: int
    seed: int
    proximal_mu: float = 0.0
    controls: Controls | None = None
    timeout: float | None = None
    moments: bytes = b""
    began: float = field(default_factory=time.monotonic, init=False)
    step: int = field(default=0, init=False)

    def run(self) -> LocalResult:
        """Take all the steps; whatever becomes of them, no gradient is left behind."""
        trainer, device = self.trainer, self.trainer.args.device
        total = torch.zeros((), device=device)
        number = trainer.processes.share[0]  # a process with batches of its own needs dropout of its own
        own = ClientSteps(trainer, self.proximal_mu, self.controls)
        try:
            with (
                alarm(None if trainer.processes.together else self._rest, self._hangs),
                trainer.optimizers_forgotten(),
                torch.random.fork_rng(cuda_devices(device)),
                mode_set_once(trainer.model_wrapped),
            ):
                own.begin(self.steps, self.moments)
                torch.manual_seed(derive_seed(self.seed, "dropout", *([number] if number else [])))
                for step in range(1, self.steps + 1):
                    self.step = step
                    trainer.check_stop()
                    total += self._step(own)
                    self._check_time(step)
                trainer.moments = own.moments() if trainer.args.keep_optimizer else b""
        finally:
            own.drop_gradients()
        return LocalResult(float(total) / self.steps, self.steps, own.control(self.steps))

    def _step(self, own: ClientSteps) -> Tensor:
        """One optimizer step; its loss."""
        trainer = self.trainer
        micro_batches, num_items = trainer.step_batches(self._batches_in_time())
        trainer.step_begins()
        loss = trainer.processes.add_gradients(own.parameters, partial(trainer.backward, micro_batches, num_items))
        own.take(loss)
        return loss

    def _batches_in_time(self) -> Iterator[list[dict[str, Any]]]:
        """The next step's batches; where processes work together, too long a wait ends here and is told to all."""
        with alarm(self._rest if self.trainer.processes.together else None, self._hangs):
            batch = next(self.batches)
        yield batch

    @property
    def _rest(self) -> float | None:
        """Seconds until a step that hangs is broken off."""
        return None if self.timeout is None else self.timeout + GRACE - (time.monotonic() - self.began)

    def _hangs(self) -> ClientTimeoutError:
        return ClientTimeoutError(
            f"step {self.step} of {self.steps} has not ended {self.timeout:g} s after the first began: "
            "client_timeout; see whether its data can be read, or raise it"
        )

    def _check_time(self, step: int) -> None:
        if self.timeout is None:
            return
        seconds = self.trainer.processes.agreed(time.monotonic() - self.began)
        if seconds > self.timeout:
            raise ClientTimeoutError(
                f"{step} of {self.steps} steps took {seconds:.1f} s, client_timeout={self.timeout:g}; raise it or take "
                "fewer"
            )


class StoppedError(Exception):
    """A callback has asked for the end, in the middle of a client's local steps."""


def failure_reason(what: str, error: Exception) -> str:
    """Why a client's work failed, in one line for the record; an error of the disk is nobody's but ours, and raised."""
    if is_disk_trouble(error):
        raise error
    return one_line(f"{what} failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}", 400)


def free_memory() -> None:
    """Give back what a failed client has left behind: its graph, its activations, the device's cache."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def mode_set_once(model: nn.Module) -> Iterator[None]:
    """`model.train()` passes at once while the model is in that mode: training_step asks for it at every step, and it
    would walk over all modules. A callback that evaluates changes the mode, and changes it back, as ever."""
    walk = model.train
    model.train = lambda mode=True: model if model.training == mode else walk(mode)  # type: ignore[method-assign]
    try:
        walk()
        yield
    finally:
        del model.train


def cuda_devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
