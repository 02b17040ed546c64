"""Processes watch each other: who stops is named, who leaves in order is not missed."""
# SPDX-License-Identifier: Apache-2.0

import threading
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from fedlora_hf.launch import heartbeat
from fedlora_hf.launch.heartbeat import watch


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch):
    """The same store, seen from two processes; words every tenth of a second, lost after three seconds."""
    monkeypatch.setattr(heartbeat, "EVERY", 0.1)
    monkeypatch.setattr(heartbeat, "LIMIT", 3.0)
    wait = timedelta(seconds=2)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=wait)
    return server, TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False, timeout=wait)


def watching(store, number: int, lost: list[str]) -> tuple[threading.Thread, threading.Event]:
    over = threading.Event()
    thread = threading.Thread(target=watch, args=(store, number, 2, over, lost.append), daemon=True)
    thread.start()
    return thread, over


@pytest.mark.parametrize("silent", [0, 1])
def test_a_process_that_says_nothing_any_more_is_named(stores, silent: int) -> None:
    lost: list[str] = []
    thread, _ = watching(stores[1 - silent], 1 - silent, lost)
    thread.join(timeout=20)
    assert len(lost) == 1
    assert lost[0].startswith(f"fedlora: error: process {silent} of 2 has not been heard of for ")
    assert "--resume_from last goes on" in lost[0]


def test_processes_that_live_or_have_left_in_order_are_not_lost(stores) -> None:
    lost: list[str] = []
    first, first_over = watching(stores[0], 0, lost)
    second, second_over = watching(stores[1], 1, lost)
    second.join(timeout=4.5)
    second_over.set()
    second.join(timeout=10)
    first.join(timeout=4.5)
    assert first.is_alive()
    first_over.set()
    first.join(timeout=10)
    assert not first.is_alive()
    assert lost == []


def test_alone_nothing_is_watched() -> None:
    threads = threading.active_count()
    with heartbeat.heartbeat(0, 1):
        assert threading.active_count() == threads
