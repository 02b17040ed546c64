"""Files, written whole or not at all, and read without trust: bounded, never through a link that leads elsewhere."""
# SPDX-License-Identifier: Apache-2.0

import errno
import json
import os
import secrets
import shutil
import stat
from pathlib import Path
from typing import Any, BinaryIO

from fedlora_hf.errors import StorageError

# What a JSON text of ours may hold at most, in values; each costs up to some hundred bytes once it is read.
MAX_JSON_VALUES = 4_000_000
# Longer whole numbers become floats: nothing here counts that far, and mixed arithmetic with them overflows.
_MAX_DIGITS = 18


# No room, no quota, too large, read-only, or broken: the machine's trouble, never that of a client or a file.
_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def is_disk_trouble(error: BaseException) -> bool:
    """Whether an error says that nothing can be written any more."""
    return isinstance(error, OSError) and error.errno in _TROUBLE


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader, or a crash, sees the old file or the new one, never a half.

    The draft has a name that nobody can know before and is made anew, never opened through a link that lies there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def open_regular(path: Path, max_bytes: int | None = None) -> BinaryIO:
    """Open a plain file to read it: the one way that files of anybody's are opened.

    A pipe would be waited for, a device or socket read for ever. What was opened is asked once more what it is: another
    may have been put in its place in between. Links are followed, as caches are made of them. OSError when it cannot be
    opened; ValueError when it is no plain file, or larger than `max_bytes` (None: any size).
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a device alone can do something to it
        raise ValueError("not a plain file")
    # Without O_NONBLOCK the open itself waits for a pipe's other end; for plain files it means nothing.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError("not a plain file")
        if max_bytes is not None and facts.st_size > max_bytes:
            raise ValueError(f"larger than {_size(max_bytes)}")
        return open(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_regular(path: Path, max_bytes: int | None = None) -> bytes:
    """The content of a plain file of at most `max_bytes`; errors as of `open_regular`."""
    with open_regular(path, max_bytes) as file:
        content = file.read() if max_bytes is None else file.read(max_bytes + 1)
    if max_bytes is not None and len(content) > max_bytes:  # it has grown meanwhile
        raise ValueError(f"larger than {_size(max_bytes)}")
    return content


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"


def read_json(path: Path, max_bytes: int) -> Any:
    """The JSON value in `path`.

    OSError when it cannot be read; ValueError when it is no plain file, larger than `max_bytes`, not UTF-8, not JSON,
    nested too deeply, or of more values than MAX_JSON_VALUES, which a small file can unfold to fill the memory with.
    """
    return parse_json_bytes(read_regular(path, max_bytes), MAX_JSON_VALUES)


def parse_json_bytes(content: bytes, max_values: int) -> Any:
    """`parse_json` of UTF-8 bytes that hold at most `max_values` values; ValueError for more, before any is made."""
    if sum(content.count(sign) for sign in (b",", b"[", b"{")) > max_values:
        raise ValueError(f"more than {max_values} values")
    return parse_json(content.decode("utf-8"))


def parse_json(text: str) -> Any:
    """json.loads, for texts of anybody's: ValueError too for deep nesting and for half of a character (a surrogate)."""
    try:
        value = json.loads(text, parse_int=_whole)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MAX_DIGITS else float(digits)


def within(folder: Path, *names: str) -> Path:
    """folder/names..., none of which may be a link: StorageError, because it could lead out of the folder."""
    path = folder
    for name in names:
        path = path / name
        if path.is_symlink():
            raise StorageError(f"{path}: is a link, which may lead out of {folder}; remove it")
    return path


def remove_tree(path: Path) -> None:
    """Take a folder away: out of sight at once, so that no half of it is ever seen, then for good.

    Of a link the link goes, never what it leads to. What is not there is left so.
    """
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        gone = path.with_name(f".{path.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-done, right in `folder`: drafts of files and folders on their way out."""
    for path in sorted(folder.glob(".*.tmp")) + sorted(folder.glob(".*.gone")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
