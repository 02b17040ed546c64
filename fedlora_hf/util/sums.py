"""sha256 of a folder's files, kept beside them in the form that `sha256sum -c SHA256SUMS` reads."""
# SPDX-License-Identifier: Apache-2.0

import hashlib
import os
import re
from pathlib import Path

from fedlora_hf.util.disk import write_atomically

SUMS = "SHA256SUMS"
MAX_BYTES = 64 * 1024**2
_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path, changed: str | None = None) -> None:
    """Write the sums of all files below `folder`; where `changed` is given, of that one, and the others as told."""
    if changed is None:
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        names = (path.relative_to(folder).as_posix() for path in files)
        sums = {name: file_sha256(folder / name) for name in names if name != SUMS}
    else:
        sums = {**(read_sums(folder) or {}), changed: file_sha256(folder / changed)}
    lines = [f"{sha256}  {name}\n" for name, sha256 in sorted(sums.items())]
    write_atomically(folder / SUMS, "".join(lines).encode())


def read_sums(folder: Path) -> dict[str, str] | None:
    """{file: its sha256} as they were told; None where none were (the folder is of an earlier version).

    ValueError for a file of sums that is none.
    """
    path = folder / SUMS
    if not os.path.lexists(path):
        return None
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{SUMS} is no plain file of sums")
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{SUMS} holds what is no sum")
        found[match[2]] = match[1]
    return found


def changed_file(folder: Path, below: str = "") -> str | None:
    """The first file of `folder` that is not as its sum tells, and how; None where all are.

    below: look at files whose name begins so alone. Files in clients/ may be missing: updates that nothing needs any
    more are taken away. ValueError for sums that cannot be read.
    """
    for name, told in sorted((read_sums(folder) or {}).items()):
        path = folder / name
        if not name.startswith(below) or (name.startswith("clients/") and not os.path.lexists(path)):
            continue
        if path.is_symlink() or not path.is_file():
            return f"{name} is missing"
        if file_sha256(path) != told:
            return f"{name} is not the file that was written: its sha256 differs"
    return None
