"""An error raised out of whatever the main thread is doing, when it takes too long: a batch that never comes, say."""
# SPDX-License-Identifier: Apache-2.0

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def alarm(seconds: float | None, error: Callable[[], Exception]) -> Iterator[None]:
    """Raise `error()` where the main thread stands once `seconds` have passed inside; None: never.

    It is a signal (SIGALRM), so it reaches Python code, and waits and sleeps of it; not a call into C that never
    returns. Nothing is done in another thread, or where there is no such signal.
    """
    here = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    if seconds is None or not here:
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise error()

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
