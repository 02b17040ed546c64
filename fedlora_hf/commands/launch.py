"""Running a trainer as a file: help at once, exit codes as of `fedlora`, a word when too few processes came."""
# SPDX-License-Identifier: Apache-2.0

import sys
from collections.abc import Callable, Sequence

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
    """0 when `action` is done, 130 when interrupted; with one line on standard error 2 for anything a user can mend, 3
    where a limit that the user set stopped a round."""
    try:
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
    return 0
