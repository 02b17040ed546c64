"""Progress on every long step: rich bars on a terminal, plain lines elsewhere, nothing when disabled."""
# SPDX-License-Identifier: Apache-2.0

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bars

Item = TypeVar("Item")
LINE_EVERY_S = 10.0  # at most one plain line of a transfer in so many seconds


class Progress:
    """Shows how far a run is. One instance a run; `console` writes to standard error."""

    def __init__(self, enabled: bool = True, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.enabled = enabled

    def say(self, text: str) -> None:
        """One plain line."""
        if self.enabled:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def over(self, items: Iterable[Item], title: str, total: int | None = None) -> Iterator[Item]:
        """Iterate with a bar that names the current item and disappears at the end.

        total: how many there will be, where `items` cannot say.
        """
        if not self.enabled or not self.console.is_terminal:
            yield from items
            return
        columns = [
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        ]
        with Bars(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(title, total=len(items) if isinstance(items, Sized) else total)
            for item in items:
                progress.update(task, description=f"{title} {item}" if isinstance(item, str) else title)
                yield item
                progress.advance(task)

    @contextmanager
    def transfer(self, title: str, files: int, size: int) -> Iterator[Callable[[int, int], None]]:
        """Show that `files` files of `size` bytes in all travel; call what is given with those that have arrived since.

        On a terminal a bar of bytes with its speed, elsewhere lines, ten seconds apart or more. Last, one line says
        what it came to; a transfer that fails says nothing more.
        """
        start = time.monotonic()
        on_terminal = self.enabled and self.console.is_terminal
        if not on_terminal:
            self.say(f"{title}: {files} files, {_megabytes(size)}")
        columns = [
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        ]
        bars = Bars(*columns, console=self.console, transient=True, disable=not on_terminal)
        # Bars that are disabled are not started either: rich 13.9 prints an empty line when they stop.
        with bars if on_terminal else nullcontext(bars) as progress:
            task = progress.add_task(title, total=size)
            count, said = 0, start

            def arrived(more: int, bytes_more: int) -> None:
                nonlocal count, said
                count += more
                progress.update(task, advance=bytes_more, description=f"{title} {count}/{files} files")
                if not on_terminal and count < files and time.monotonic() - said >= LINE_EVERY_S:
                    said = time.monotonic()
                    done = _megabytes(progress.tasks[task].completed)
                    self.say(f"{title}: {count} of {files} files, {done} of {_megabytes(size)}")

            yield arrived
        self.say(f"{title}: done, {_megabytes(size)} in {time.monotonic() - start:.1f} s")


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB"
