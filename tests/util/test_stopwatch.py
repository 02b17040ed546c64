"""Parts of a time that add up: one inside another stops it, and the rest has a name."""
# SPDX-License-Identifier: Apache-2.0

import pytest

from fedlora_hf.util import stopwatch
from fedlora_hf.util.stopwatch import part, timed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """[now]: time goes on when a test says so."""
    now = [100.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])
    return now


def test_parts_inside_parts_and_the_rest_add_up(clock: list[float]) -> None:
    with timed() as watch:
        clock[0] += 1
        with part("train"):
            clock[0] += 2
            with part("write"):
                clock[0] += 4
            clock[0] += 8
        with part("write"):
            clock[0] += 16
            assert watch.read() == {"train": 10, "write": 20, "idle": 1}  # the one under way is counted
            clock[0] += 32
        assert watch.read() == {"train": 10, "write": 52, "idle": 1}
        assert sum(watch.read().values()) == watch.total


def test_a_part_that_fails_is_over(clock: list[float]) -> None:
    @part("train")
    def failing() -> None:
        clock[0] += 2
        raise ValueError("no")

    with timed() as watch:
        with pytest.raises(ValueError, match="no"):
            failing()
        clock[0] += 4
        assert watch.read() == {"train": 2, "idle": 4}


def test_without_a_stopwatch_nothing_is_timed() -> None:
    with part("train"):
        pass
    with timed() as watch:
        pass
    with part("train"):
        pass
    assert watch.seconds == {}
