"""Wall time by part, of whatever runs under a stopwatch: `with timed() as watch`, and deeper down `with part("train")`.

A part inside another stops the outer one's clock, so the parts add up, and what is in none of them is the rest.
"""
# SPDX-License-Identifier: Apache-2.0

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# The parts of a round, in their order, and what each is.
PARTS = {
    "train": "clients' local training; on a Flower server, waiting for the nodes",
    "judge": "trying the updates on others' validation data, where that is done",
    "screen": "looking at the updates: sound ones",
    "aggregate": "combining them",
    "score": "the global adapter on the test splits",
    "write": "files, and pushing them",
    "idle": "waiting for other processes, and what is in no other part",
}
REST = "idle"


class Stopwatch:
    """seconds: {part: so far}, of the parts that are over, or were stopped by one inside."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = self._since = time.perf_counter()
        self._open: list[str] = []

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._began

    def read(self) -> dict[str, float]:
        """Seconds of every part until now, those under way included, and under REST of all that is in none."""
        self._charge()
        return {**self.seconds, REST: max(self.total - sum(self.seconds.values()), 0.0)}

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside belongs to this part."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()


_running: ContextVar[Stopwatch | None] = ContextVar("stopwatch", default=None)


@contextmanager
def timed() -> Iterator[Stopwatch]:
    """A stopwatch that runs inside."""
    watch = Stopwatch()
    token = _running.set(watch)
    try:
        yield watch
    finally:
        _running.reset(token)


@contextmanager
def part(name: str) -> Iterator[None]:
    """What happens inside belongs to this part, where a stopwatch runs; else nothing is timed."""
    watch = _running.get()
    if watch is None:
        yield
        return
    with watch.part(name):
        yield
