"""How a process of several leaves: its process group is taken down while the interpreter still lives.

A thread of gloo lets go of the last message's tensors a moment after the message has arrived. Where the interpreter is
already ending, that moment ends the process with "terminate called without an active exception": one such process in
nine, where nothing else is done after the last message. torch leaves the taking down to the program
(pytorch/pytorch, pull request 179291).
"""
# SPDX-License-Identifier: Apache-2.0

import atexit
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def leaving() -> Iterator[None]:
    """What is said among processes meanwhile is over when this process ends, if it ended well.

    After an error nothing is taken down: others may still wait for a message, and taking down would wait for them.
    """
    atexit.unregister(_take_down)
    yield
    atexit.register(_take_down)


def _take_down() -> None:
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
