"""Processes that end right after their last message end well."""
# SPDX-License-Identifier: Apache-2.0

import atexit
import os
from pathlib import Path

import pytest
from launched import launch

from fedlora_hf.launch import leaving

# Eight times three processes that leave while their last message is still under way: without `leaving`, one in nine
# is ended by a signal.
SCRIPT = """
import os, sys
import torch, torch.distributed as dist
from fedlora_hf.launch.leaving import leaving

def leave(number, port):
    os.environ.update(MASTER_ADDR="127.0.0.1")
    store = dist.TCPStore("127.0.0.1", port, 3, number == 0)
    dist.init_process_group("gloo", store=store, rank=number, world_size=3)
    with leaving():
        dist.all_gather([torch.empty(1) for _ in range(3)], torch.ones(1), async_op=True)
    sys.exit(0)

def free_port():
    import socket
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]

for _ in range(8):
    port, children = free_port(), []
    for number in range(3):
        child = os.fork()
        if not child:
            leave(number, port)
        children.append(child)
    os.write(1, f"{[os.waitpid(child, 0)[1] for child in children]}\\n".encode())
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forks")
def test_nobody_is_ended_by_a_signal(tmp_path: Path) -> None:
    assert launch(SCRIPT, tmp_path, 1) == ["[0, 0, 0]"] * 8


def test_after_an_error_nothing_is_taken_down(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[object] = []
    monkeypatch.setattr(atexit, "register", registered.append)
    monkeypatch.setattr(atexit, "unregister", lambda function: registered.clear())
    with leaving.leaving():
        assert not registered
    assert len(registered) == 1
    with pytest.raises(OSError, match="disk"), leaving.leaving():
        raise OSError("disk")
    assert not registered
