"""Where hostile input meets the program: bounded memory and time, a line for what goes wrong, nothing else touched."""
# SPDX-License-Identifier: Apache-2.0

import os
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedlora_hf.cli import main

MORE_MEMORY = 1 << 30  # what one case may map more than is mapped already, in bytes
SECONDS = 60


class TookTooLong(BaseException):
    """Not an Exception: nobody may catch it."""


@contextmanager
def bounds() -> Iterator[None]:
    """At most MORE_MEMORY more address space, at most SECONDS."""

    def late(*args: Any) -> None:
        raise TookTooLong

    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MORE_MEMORY, old[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, old)


def tree(*folders: Path) -> dict[str, tuple[Any, ...]]:
    """{path: kind, size, time of change or target of the link} of everything under `folders`, links not followed."""
    found: dict[str, tuple[Any, ...]] = {}
    for folder in folders:
        for place, names, files in os.walk(folder):
            for name in (*names, *files):
                path = Path(place, name)
                facts = path.lstat()
                target = os.readlink(path) if path.is_symlink() else ""
                size, changed = (facts.st_size, facts.st_mtime_ns) if not path.is_dir() or target else (0, 0)
                found[str(path)] = (facts.st_mode, size, changed, target)
    return found


def run(arguments: Sequence[str], capsys: Any) -> tuple[int, str]:
    """(exit code, what was said on standard error) of a command; a traceback fails the test by itself."""
    return called(lambda: main(arguments), capsys)


def called(action: Callable[[], int], capsys: Any) -> tuple[int, str]:
    capsys.readouterr()
    with bounds():
        code = action()
    said = capsys.readouterr().err
    assert code in (0, 2), said
    if code == 2:
        errors = [line for line in said.split("\n") if line.startswith("fedlora: error: ")]
        assert len(errors) == 1, said
        assert errors[0].isprintable()
        assert len(errors[0]) < 2100
    return code, said
