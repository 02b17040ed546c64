"""Others' talk when a run starts: what tells a user nothing is silenced where it comes from, and nothing else is.

bitsandbytes and DeepSpeed, where they are installed, are imported by PEFT and transformers, asked for or not.
"""
# SPDX-License-Identifier: Apache-2.0

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# {logger: how the messages begin that are left out}. Of a kernel that is faster for 4-bit layers on some CPUs and needs
# one more package; and that a machine without a GPU is one, as DeepSpeed says on standard output.
SILENCED = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "DeepSpeed": "Setting accelerator to CPU",
}


class _Without(logging.Filter):
    """Drops the messages of a logger that begin so."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.beginning)


def silence() -> None:
    """Leave the messages of `SILENCED` out from now on; their libraries need not be imported yet."""
    for name, beginning in SILENCED.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Without) for known in logger.filters):
            logger.addFilter(_Without(beginning))


@contextmanager
def no_bars_in_logs() -> Iterator[None]:
    """Without the bars of transformers, datasets and the Hub's client where standard error is no terminal.

    A bar goes back to the start of its line, which in a file is one line of thousands of characters.
    """
    from datasets.utils import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled
    from transformers.utils import logging as transformers_logging

    if sys.stderr is not None and sys.stderr.isatty():
        yield
        return
    models, data = transformers_logging.is_progress_bar_enabled(), is_progress_bar_enabled()
    if models:
        transformers_logging.disable_progress_bar()
    if data:
        disable_progress_bars()
    try:
        yield
    finally:
        if models:
            transformers_logging.enable_progress_bar()
        if data:
            enable_progress_bars()
