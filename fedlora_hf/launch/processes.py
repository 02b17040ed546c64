"""What the processes of one run say to each other: sums, shares of the work, and failures, so that none waits for ever.

Processes share out a round's clients (the default), or work *together* on each client: every one takes its share of
each step's micro-batches, and gradients are added up. That is DistributedDataParallel without its wrapper: an adapter's
gradient is one small message a step, and another part of it may be trained from one client to the next.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count as counting
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from fedlora_hf.errors import ConfigError, FedLoraError, ProcessError, RoundError, one_line

Value = TypeVar("Value")
# One name for each list that is shared out: counted by all processes alike, and no trainer begins again.
_QUEUES = counting()


class Processes:
    """The processes of a run, seen from one of them. Alone, each method is the identity and costs nothing.

    number, count: of this process, and of all. together: they train each client together. lockstep: the base model is
    sharded over them, so all must go through it equally often. Without an accelerator: one process by itself.
    """

    def __init__(
        self, accelerator: Accelerator | None = None, *, together: bool = False, lockstep: bool = False
    ) -> None:
        self.together, self.lockstep = False, False
        self.number, self.count = (0, 1)
        if accelerator is None:
            return
        self.number, self.count = accelerator.process_index, accelerator.num_processes
        dist = torch.distributed
        started = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if started > self.count:  # accelerate counts GPUs, and would let each process run alone, in the same folder
            raise ConfigError(f"{started} processes were started, and there is no GPU; pass --use_cpu, or start one")
        self.together = together and self.count > 1
        self.lockstep = lockstep and self.count > 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.number == 0

    @property
    def share(self) -> tuple[int, int]:
        """(number, count) of this process among those that share out a client's batches."""
        return (self.number, self.count) if self.together else (0, 1)

    @property
    def writes(self) -> bool:
        """Whether what this process has made of a client is its to write: all have made the same, where together."""
        return self.first or not self.together

    def taken(self, items: Sequence[Value]) -> Iterator[Value]:
        """Those of `items`, in their order, that this process works on: each goes to whichever is free next.

        Called alike by every process. Where they work together, all items are for all.
        """
        if self.count == 1 or self.together:
            yield from items
            return
        queue = f"fedlora_hf/queue/{next(_QUEUES)}"
        world: Any = torch.distributed.group.WORLD
        store = world.get_group_store()
        while (place := store.add(queue, 1) - 1) < len(items):
            yield items[place]

    # ---- values ------------------------------------------------------------------------------------------------------

    def gathered(self, found: dict[str, Any]) -> dict[str, Any]:
        """Every process's {client: value} as one, sorted, on every process. Together, all have all of it already."""
        parts = gather_object([found]) if self.count > 1 and not self.together else [found]
        return dict(sorted(item for part in parts for item in part.items()))

    def agreed(self, value: Value) -> Value:
        """The first process's value, where all work together and have to go the same way."""
        return broadcast_object_list([value])[0] if self.together else value

    def total(self, work: Callable[[], Tensor], like: Tensor) -> Tensor:
        """The sum over the processes of what `work` gives: float vectors of `like`'s size and device.

        Where it raises on one process, ProcessError on all of them, and nobody waits for a message that never comes.
        """
        if not self.together:
            return work()
        failure: Exception | None = None
        try:
            own = work()
        except Exception as error:  # told to the others below, whatever it is
            own, failure = torch.zeros_like(like), error
        message = torch.cat([own, own.new_tensor([0.0 if failure is None else 1.0])])
        torch.distributed.all_reduce(message)
        if message[-1]:
            raise ProcessError(self._first_told(failure)) from failure
        return message[:-1]

    def add_gradients(self, parameters: Sequence[nn.Parameter], loss: Callable[[], Tensor]) -> Tensor:
        """Call `loss`, which leaves gradients; then each parameter has the sum of all processes', on all of them alike.

        Returns the sum of the losses. A parameter that has no gradient anywhere is left without one.
        """
        if not self.together:
            return loss()
        sizes = [parameter.numel() for parameter in parameters]
        device = parameters[0].device

        def message() -> Tensor:
            own = loss().reshape(1).to(device, torch.float32)
            here = own.new_tensor([0.0 if parameter.grad is None else 1.0 for parameter in parameters])
            flat = [_zeros(p) if p.grad is None else p.grad.reshape(-1).float() for p in parameters]
            return torch.cat([own, here, *flat])

        like = torch.zeros(1 + len(sizes) + sum(sizes), device=device)
        total, anywhere, *flat = self.total(message, like).split([1, len(sizes), *sizes])
        for parameter, gradient, has_one in zip(parameters, flat, anywhere.tolist(), strict=True):
            if has_one:
                # A copy: views would keep the message alive, and clipping in place would write into it.
                parameter.grad = gradient.reshape(parameter.shape).to(parameter.dtype, copy=True)
        return total[0]

    # ---- failures ----------------------------------------------------------------------------------------------------

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Wait at the end until every process is done; when one raises inside, all raise.

        An error of this package's own is raised as it is on all. Any other is raised, with its traceback, where it
        happened, and as a ProcessError elsewhere. What is inside must not wait for others, unless it fails on all.
        """
        if self.count == 1:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # told to the others below, whatever it is
            failure = error
        told = self._told(failure)
        if told is None:
            return
        if failure is not None and not isinstance(failure, FedLoraError):
            raise failure
        raise told from failure

    def each_or_none(self) -> AbstractContextManager[None]:
        """`all_or_none` for one client of many, where all work on the same one; elsewhere nothing."""
        return self.all_or_none() if self.together else nullcontext()

    def everyones(self, value: Value) -> list[Value]:
        """Every process's value, in their order."""
        return list(gather_object([value])) if self.count > 1 else [value]

    def differing(self, value: str) -> int | None:
        """The first process that has come to another value than process 0; None where all have the same."""
        values = self.everyones(value)
        return next((number for number, other in enumerate(values) if other != values[0]), None)

    def check_same(self, value: str, what: str) -> None:
        """RoundError, on all processes, when those that work together have different values (checksums) of `what`."""
        if self.together and (odd := self.differing(value)) is not None:
            raise RoundError(
                f"{what}: process {odd} has come to another result than process 0; all processes must run the same "
                "code, versions and data on the same kind of device; --client_parallel clients needs no agreement"
            )

    def _told(self, failure: Exception | None) -> FedLoraError | None:
        """What to raise when any process failed: the first one's own error, or a ProcessError that quotes it."""
        if failure is None:
            own: FedLoraError | None = None
        elif isinstance(failure, FedLoraError):
            own = type(failure)(str(failure))
        else:
            own = ProcessError(self._quoted(failure))
        return next((error for error in gather_object([own]) if error is not None), None)

    def _first_told(self, failure: Exception | None) -> str:
        quotes = gather_object([None if failure is None else self._quoted(failure)])
        return str(next(quote for quote in quotes if quote is not None))

    def _quoted(self, failure: Exception) -> str:
        return f"process {self.number}: {type(failure).__name__}: {one_line(failure)}"


def _zeros(parameter: nn.Parameter) -> Tensor:
    return torch.zeros(parameter.numel(), device=parameter.device)


def missing_processes(environ: Mapping[str, str], world_size: int) -> str | None:
    """One line when `accelerate launch --cpu --num_processes N` was asked for N > 1 and started one, else None.

    Without mpirun its launcher starts a single process and says nothing; the address it sets for N > 1 gives it away.
    """
    if world_size > 1 or environ.get("ACCELERATE_USE_CPU", "").lower() != "true" or "MASTER_ADDR" not in environ:
        return None
    return (
        "fedlora: accelerate launch --cpu started 1 process though more were asked for; torchrun --nproc_per_node N "
        "starts N; one process is slower, and a step of --client_parallel data is smaller with it"
    )
