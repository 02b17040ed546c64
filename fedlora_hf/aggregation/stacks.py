"""A cohort's factors on a GPU, several modules of one shape at a time: read and moved while others are worked on.

Each module is stacked in page-locked memory by one of several threads and moved on a stream of its own, so that neither
reading nor moving waits for the other; the next group is under way while one is worked on. What fits stays there for a
second reading.
"""
# SPDX-License-Identifier: Apache-2.0

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from fedlora_hf.update import ClientUpdate, LoraFactors

# Modules that are worked on at once, at most; threads that read.
AT_ONCE, READERS = 32, 8
# What a module is worked on in takes, in sizes of its clients' factors in float32, and the share of the free memory
# that all factors may keep.
WORK, KEPT = 12, 0.4


class Stack(NamedTuple):
    """Of M modules and K clients: B (M, K, out, r) and A (M, K, r, in), as the clients sent them, zero-padded to one
    rank; scales (M, K) float64; W = scale * B @ A."""

    B: Tensor
    A: Tensor
    scales: Tensor

    def pair(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(B, A) in `dtype` with the scale folded into B, as `LoraFactors.pair`."""
        return self.B.to(dtype) * self.scales[..., None, None].to(dtype), self.A.to(dtype)

    def rows(self, places: Sequence[int]) -> "Stack":
        """Of these modules alone."""
        first, last = places[0], places[-1] + 1
        if list(places) == list(range(first, last)):
            return Stack(*(part[first:last] for part in self))
        index = torch.tensor(list(places)).to(self.B.device)
        return Stack(*(part.index_select(0, index) for part in self))


@dataclass(eq=False)
class Stacks:
    """updates: of all clients, in order. modules: sorted. device: where the stacks are; memory: free bytes there."""

    updates: Sequence[ClientUpdate]
    modules: Sequence[str]
    device: torch.device
    memory: int
    groups: tuple[tuple[str, ...], ...] = field(init=False)
    _waiting: dict[int, list[Future[None]]] = field(init=False, default_factory=dict)
    _stacks: dict[int, Stack] = field(init=False, default_factory=dict)
    _own: threading.local = field(init=False, default_factory=threading.local)

    def __post_init__(self) -> None:
        states = [update.state for update in self.updates]
        ranks = {module: max(state.rank(module) for state in states) for module in self.modules}
        shapes: dict[tuple[int, int, int], list[str]] = {}
        for module in self.modules:
            outline = states[0].outline
            out, width = states[0][module].shape if outline is None else outline.shapes[module]
            shapes.setdefault((out, width, ranks[module]), []).append(module)
        sizes = {shape: 4 * len(states) * shape[2] * (shape[0] + shape[1]) for shape in shapes}
        self.groups = tuple(
            tuple(names[first : first + step])
            for shape, names in shapes.items()
            for step in [max(1, min(AT_ONCE, int(self.memory / 2 / (WORK * sizes[shape]))))]
            for first in range(0, len(names), step)
        )
        self._shape = {module: shape for shape, names in shapes.items() for module in names}
        self._keep = sum(sizes[shape] * len(names) for shape, names in shapes.items()) < KEPT * self.memory
        self._pool = ThreadPoolExecutor(READERS) if self.device.type == "cuda" else None

    def stacked(self, names: Sequence[str]) -> Stack:
        """Of modules of one group. Reading the groups in order, each once, is what this is fast at."""
        number = next(n for n, group in enumerate(self.groups) if names[0] in group)
        stack = self._stacks.get(number) or self._begun(number)
        for read in self._waiting.pop(number, ()):
            read.result()
        following = number + 1
        if self._pool is not None and following < len(self.groups) and following not in self._stacks:
            self._begun(following)
        if not self._keep:
            self._stacks = {n: kept for n, kept in self._stacks.items() if n in (number, following)}
        return stack.rows([self.groups[number].index(name) for name in names])

    def factors(self, module: str) -> list[LoraFactors]:
        """Every client's factors of one module, there."""
        stack, scales = self.stacked((module,)), [update.state.scale(module) for update in self.updates]
        ranks = [update.state.rank(module) for update in self.updates]
        return [
            LoraFactors(stack.A[0, k, :rank], stack.B[0, k, :, :rank], scale)
            for k, (rank, scale) in enumerate(zip(ranks, scales, strict=True))
        ]

    def _begun(self, number: int) -> Stack:
        """Where a group's factors will be, and the reading of each of its modules under way."""
        names = self.groups[number]
        out, width, rank = self._shape[names[0]]
        K, dtype = len(self.updates), self._dtype(names)
        B = torch.empty(len(names), K, out, rank, dtype=dtype, device=self.device)
        A = torch.empty(len(names), K, rank, width, dtype=dtype, device=self.device)
        scales = [[update.state.scale(module) for update in self.updates] for module in names]
        stack = Stack(B, A, torch.tensor(scales, dtype=torch.float64).to(self.device))
        if self._pool is None:
            for m, name in enumerate(names):
                for parts, place in zip(self._parts(name), (B[m], A[m]), strict=True):
                    _put(parts, place, lambda like: torch.empty(like.shape, dtype=like.dtype))
        else:
            free = torch.cuda.Event()  # what this memory was used for before is over
            free.record(torch.cuda.current_stream(self.device))
            self._waiting[number] = [
                self._pool.submit(self._read, name, B[m], A[m], free) for m, name in enumerate(names)
            ]
        self._stacks[number] = stack
        return stack

    def _dtype(self, names: Sequence[str]) -> torch.dtype:
        """The widest of the clients' dtypes; float32 where values are on disk, which adapters are saved in at most."""
        if any(update.state.outline is not None for update in self.updates):
            return torch.float32
        factors = [update.state[name] for update in self.updates for name in names]
        return reduce(torch.promote_types, {part.dtype for f in factors for part in (f.A, f.B)})

    def _parts(self, module: str) -> tuple[list[Tensor], list[Tensor]]:
        """Every client's B and every client's A, each read once."""
        factors = [update.state[module] for update in self.updates]
        return [f.B.detach() for f in factors], [f.A.detach() for f in factors]

    def _read(self, module: str, B: Tensor, A: Tensor, free: torch.cuda.Event) -> None:
        """One module of every client into its place."""
        stream = self._stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            stream.wait_event(free)
            for side, parts, place in zip("BA", self._parts(module), (B, A), strict=True):
                _put(parts, place, partial(self._locked, side))
        stream.synchronize()  # the memory is used again for the next module

    def close(self) -> None:
        """End the threads, and let go of what they read."""
        if self._pool is not None:
            self._pool.shutdown()
        self._stacks.clear()

    def _stream(self) -> torch.cuda.Stream:
        if not hasattr(self._own, "stream"):
            torch.set_num_threads(1)
            self._own.stream = torch.cuda.Stream(self.device)
        stream: torch.cuda.Stream = self._own.stream
        return stream

    def _locked(self, side: str, like: Tensor) -> Tensor:
        """This thread's page-locked memory, as large as was needed so far, in the shape and dtype of `like`."""
        kept: Tensor | None = getattr(self._own, side, None)
        size = like.numel() * like.element_size()
        if kept is None or kept.numel() < size:
            kept = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            setattr(self._own, side, kept)
        return kept[:size].view(like.dtype).view(like.shape)


def _put(parts: Sequence[Tensor], place: Tensor, room: Callable[[Tensor], Tensor]) -> None:
    """The parts into their place: from the CPU all at once, by way of what `room` gives; else one by one."""
    if all(part.device.type == "cpu" for part in parts):
        place.copy_(_filled(parts, room(place)), non_blocking=True)
    else:
        _fill(parts, place)


def _filled(parts: Sequence[Tensor], room: Tensor) -> Tensor:
    """`room`, on the CPU as the parts are, with these one after the other."""
    if all(part.shape == room.shape[1:] and part.dtype == room.dtype for part in parts):
        return torch.stack(list(parts), out=room)
    _fill(parts, room)
    return room


def _fill(parts: Sequence[Tensor], place: Tensor) -> None:
    """Copy them one by one, with zeros where one is smaller."""
    place.zero_()
    for k, part in enumerate(parts):
        place[k, : part.shape[0], : part.shape[1]] = part
