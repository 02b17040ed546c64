"""The garbage collector waits while modules are imported: what they make stays, so that looking through it is idle.

Importing torch, transformers, PEFT and datasets makes half a million objects, through all of which the collector goes
seven times, and through the newer ones a hundred times more: a sixth of the time that a run takes to start.
"""
# SPDX-License-Identifier: Apache-2.0

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def not_collecting(own_process: bool = False) -> Iterator[None]:
    """Nothing is collected inside. own_process: nobody else's objects are about, so that, where torch comes in here for
    the first time, all that is there at the end is left alone for good (`gc.freeze`): later looks are short, too."""
    collecting, fresh = gc.isenabled(), "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if own_process and fresh and "torch" in sys.modules:
            gc.freeze()
        if collecting:
            gc.enable()
