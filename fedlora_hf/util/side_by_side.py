"""Several modules at once on a CPU: each on one thread, as many as torch may use threads, results in order.

Small eigenproblems and tall thin products use a second core badly; two modules use two cores well. A module's bytes are
those of one thread, however many there are.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
# Each module at work holds its clients' factors, so no more than these at once.
AT_ONCE = 4
# Numbers in the factors of all clients below which a module is too small to gain.
LARGE = 2_000_000


def side_by_side(
    work: Callable[[Item], Result], items: Sequence[Item], large: bool, at_once: int = AT_ONCE
) -> Iterator[Result]:
    """work(item) for every item, in order; an error is that of the first item that has one.

    large: whether the items are worth it; if not, or with one thread or one item, they are worked on one by one, with
    all threads.
    """
    threads = torch.get_num_threads()
    workers = min(threads, at_once, len(items))
    if not large or workers < 2:
        yield from map(work, items)
        return
    torch.set_num_threads(1)  # new threads take it over
    try:
        with ThreadPoolExecutor(workers) as pool:
            waiting = [pool.submit(_without_graph, work, item) for item in items[:workers]]
            for place in range(len(items)):
                result = waiting.pop(0).result()
                if place + workers < len(items):
                    waiting.append(pool.submit(_without_graph, work, items[place + workers]))
                yield result
    finally:
        torch.set_num_threads(threads)


def _without_graph(work: Callable[[Item], Result], item: Item) -> Result:
    with torch.no_grad():  # each thread has its own switch
        torch.set_num_threads(1)
        return work(item)
