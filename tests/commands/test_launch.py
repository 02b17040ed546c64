"""Exit codes of a command: done, refused, interrupted, terminated."""
# SPDX-License-Identifier: Apache-2.0

import os
import signal
import time

import pytest

from fedlora_hf.commands.launch import exit_code
from fedlora_hf.errors import ConfigError


def interrupted() -> None:
    raise KeyboardInterrupt


def refused() -> None:
    raise ConfigError("a=1: must be 2; pass 2")


def terminated() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)


@pytest.mark.parametrize(
    ("action", "code", "said"),
    [
        (lambda: None, 0, ""),
        (refused, 2, "fedlora: error: a=1: must be 2; pass 2"),
        (interrupted, 130, "fedlora: interrupted; committed rounds are kept, --resume_from last goes on"),
        (terminated, 143, "fedlora: terminated; committed rounds are kept, --resume_from last goes on"),
    ],
)
def test_exit_codes(action, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert exit_code(action) == code
    assert capsys.readouterr().err.strip() == said
    assert signal.getsignal(signal.SIGTERM) is before
