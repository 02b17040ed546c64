"""An alarm breaks off what takes too long, and leaves nothing behind when it was in time."""
# SPDX-License-Identifier: Apache-2.0

import signal
import threading
import time

import pytest

from fedlora_hf.launch.alarm import alarm


def test_a_wait_that_is_too_long_ends_in_the_error() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="too long"), alarm(0.1, lambda: TimeoutError("too long")):
        time.sleep(30)
    assert time.monotonic() - began < 10


def test_in_time_nothing_happens_and_the_handler_is_the_former_one() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with alarm(60, lambda: TimeoutError()):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert signal.getsignal(signal.SIGALRM) is before


def test_without_a_limit_and_in_another_thread_it_does_nothing() -> None:
    with alarm(None, lambda: TimeoutError()):
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    seen: list[float] = []

    def work() -> None:
        with alarm(0.01, lambda: TimeoutError()):
            time.sleep(0.05)
            seen.append(signal.getitimer(signal.ITIMER_REAL)[0])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [0.0]
