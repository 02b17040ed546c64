"""Running a trainer as a file: help at once, exit codes as of `fedlora`, a word when too few processes came."""
# SPDX-License-Identifier: Apache-2.0

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from fedlora_hf.errors import FedLoraError, one_line
from fedlora_hf.util.disk import is_disk_trouble


def run(main: Callable[[Sequence[str]], object], about: str | None) -> int:
    """Call `main` with the command line's arguments; the exit code, 0, 2 or 130, as `fedlora` gives it."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(f"{(about or '').strip()}\n\nFurther flags are those of fedlora train; fedlora train --help lists them.")  # noqa: T201
        return 0
    return exit_code(lambda: main(arguments))


def exit_code(action: Callable[[], object]) -> int:
    """0 when `action` is done, 130 or 143 when interrupted or terminated; with one line on standard error 2 for what a
    user can mend, 3 where a limit that the user set stopped a round."""
    try:
        with _terminated_as_interrupted():
            action()
    except FedLoraError as error:
        print(f"fedlora: error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except OSError as error:
        if not (is_disk_trouble(error) or isinstance(error, PermissionError)):
            raise
        about = f"{one_line(error.filename)}: " if error.filename else ""
        remedy = "make room" if is_disk_trouble(error) else "choose a place you may write to"
        said = f"fedlora: error: {about}{error.strerror}; {remedy}, then --resume_from last goes on"
        print(said, file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print("fedlora: interrupted; committed rounds are kept, --resume_from last goes on", file=sys.stderr)  # noqa: T201
        return 130
    except Terminated:
        print("fedlora: terminated; committed rounds are kept, --resume_from last goes on", file=sys.stderr)  # noqa: T201
        return 143
    return 0


class Terminated(BaseException):
    """Somebody has sent SIGTERM."""


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends the action as Ctrl-C does, so that locks and threads are left in order.

    Not in a run of several processes: one that waits for another in C would never hear of it, and a launcher ends all.
    """
    if threading.current_thread() is not threading.main_thread() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
