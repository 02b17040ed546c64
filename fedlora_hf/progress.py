"""Progress on every long step: rich bars on a terminal, one plain line a step elsewhere, nothing when disabled."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")


class Steps:
    """Shows the steps of a run. One instance a run; `console` writes to standard error."""

    def __init__(self, enabled: bool = True, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.enabled = enabled

    def say(self, text: str) -> None:
        """One plain line."""
        if self.enabled:
            self.console.print(text, highlight=False, markup=False)

    def over(self, items: Iterable[Item], title: str) -> Iterator[Item]:
        """Iterate with a bar that names the current item and disappears at the end."""
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
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(title, total=len(items) if isinstance(items, Sized) else None)
            for item in items:
                progress.update(task, description=f"{title} {item}" if isinstance(item, str) else title)
                yield item
                progress.advance(task)
