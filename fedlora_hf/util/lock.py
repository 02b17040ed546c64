"""One writer at a time in a folder: a lock that ends with the process that holds it, and names it."""
# SPDX-License-Identifier: Apache-2.0

import datetime
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fedlora_hf.errors import ConfigError, StorageError, one_line
from fedlora_hf.util.disk import write_atomically

LOCK, HOLDER = ".lock", ".lock.holder"


@contextmanager
def one_writer(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the folder's lock meanwhile; the folder is made where it is missing.

    The lock is the operating system's (flock, through `filelock`): it ends with the process, however that dies, so a
    file that a dead process has left stops nobody. The process that holds it may take it again.
    ConfigError, naming the holder, where another process has it; StorageError where it cannot be taken at all.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0, is_singleton=True)
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"output_dir={str(folder)!r}: {_holder(folder)} is writing there; wait until it has ended, or pass another "
            "--output_dir"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise StorageError(
            f"{folder / LOCK}: cannot be locked ({one_line(error, 120)}); pass an --output_dir on a disk that can"
        ) from None
    try:
        now = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
        told = f"process {os.getpid()} on {platform.node()}, since {now}"
        write_atomically(folder / HOLDER, told.encode())
        yield
    finally:
        if lock.lock_counter == 1:
            # While the lock is held: whoever has the file open already finds it gone, and opens it anew.
            (folder / HOLDER).unlink(missing_ok=True)
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def _holder(folder: Path) -> str:
    """Who has told that it holds the lock, as it told it."""
    try:
        with open(folder / HOLDER, "rb") as file:
            return one_line(file.read(200).decode("utf-8", "replace"), 200) or "another process"
    except OSError:
        return "another process"
