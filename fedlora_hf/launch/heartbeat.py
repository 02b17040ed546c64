"""Whether the other processes of a run still live: one that has stopped would hold the others for half an hour.

Collectives wait as long as `ddp_timeout` says (half an hour), and must: another process may be training a long client.
So each process tells a store, every few seconds and from a thread of its own, that it is there; whoever has not been
heard of for a while is named, and the run ends. What was committed stays.
"""
# SPDX-License-Identifier: Apache-2.0

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from accelerate.utils import broadcast_object_list
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it is documented there

# Seconds without a word after which a process is lost, and between two words. Our choice.
LIMIT, EVERY = 45.0, 5.0
_DONE = "done"
# The first process serves the store until it ends: others may still ask it while they finish.
_SERVED: list[TCPStore] = []


def lost_line(number: int, count: int, seconds: float) -> str:
    """What is said of a process that is not heard of any more."""
    return (
        f"fedlora: error: process {number} of {count} has not been heard of for {seconds:.0f} s: stopped, or its "
        "machine is gone; committed rounds are kept, --resume_from last goes on"
    )


def _end(line: str) -> None:
    """End this process at once: its main thread waits for a message that will not come."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201
    os._exit(1)


@contextmanager
def heartbeat(number: int, count: int, end: Callable[[str], None] = _end) -> Iterator[None]:
    """Watch the other processes meanwhile. All processes enter it alike. end: what is done when one is lost."""
    if count == 1:
        yield
        return
    store, over = _store(number), threading.Event()
    thread = threading.Thread(
        target=watch, args=(store, number, count, over, end), name="fedlora-heartbeat", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def watch(store: TCPStore, number: int, count: int, over: threading.Event, end: Callable[[str], None]) -> None:
    """Tell the store that process `number` lives, and look whether the others do, until `over` is set."""
    told = dict.fromkeys(range(count), b"")
    heard = dict.fromkeys(range(count), time.monotonic())
    beat = 0
    while True:
        leaving = over.wait(EVERY)
        beat += 1
        try:
            store.set(_key(number), _DONE if leaving else str(beat))
            if leaving:
                return
            for other in set(told) - {number}:
                word = store.get(_key(other)) if store.check([_key(other)]) else b""
                if word != told[other] or word == _DONE.encode():
                    told[other], heard[other] = word, time.monotonic()
        except (RuntimeError, ValueError):  # the store is the first process's: it does not answer
            if leaving:
                return
        for other, moment in heard.items():
            silent = time.monotonic() - moment
            if other != number and silent > LIMIT:
                end(lost_line(other, count, silent))
                return


def _store(number: int) -> TCPStore:
    """The store of this run, served by the first process on a free port; all call this alike."""
    host, wait = os.environ.get("MASTER_ADDR", "127.0.0.1"), timedelta(seconds=EVERY)
    if number == 0:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=wait)
        _SERVED.append(store)
        broadcast_object_list([store.port])
        return store
    return TCPStore(host, broadcast_object_list([None])[0], is_master=False, wait_for_workers=False, timeout=wait)


def _key(number: int) -> str:
    return f"fedlora_hf/alive/{number}"
