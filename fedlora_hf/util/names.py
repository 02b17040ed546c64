"""Client ids: what may be one. An id becomes a folder and a Hub path, so the rule is narrow and the same everywhere."""
# SPDX-License-Identifier: Apache-2.0

import re
import unicodedata
from collections.abc import Iterable

MAX_ID_LENGTH = 96
_FIT = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?")
# Names that some file system or Git host keeps for itself, whatever their case.
_RESERVED = {"con", "prn", "aux", "nul", *(f"com{i}" for i in range(1, 10)), *(f"lpt{i}" for i in range(1, 10))}


def unfit_reason(client_id: object) -> str | None:
    """Why `client_id` cannot be a client's name, or None when it can."""
    rule = f"must be 1 to {MAX_ID_LENGTH} of A-Z a-z 0-9 . _ -, starting with a letter or digit, not ending with a dot"
    if not isinstance(client_id, str) or len(client_id) > MAX_ID_LENGTH or not _FIT.fullmatch(client_id):
        return f"client id {str(client_id)[:40]!r}: {rule}; rename it"
    if ".." in client_id or client_id.split(".")[0].lower() in _RESERVED:
        return f"client id {client_id!r}: is a name that file systems reserve; rename it"
    return None


def fit_id(text: str) -> str:
    """The nearest fit client id: unfit characters become '-'. Two texts may give one id; the caller checks."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).replace("..", ".").strip("-._")[:MAX_ID_LENGTH].strip("-._")
    return name if name and unfit_reason(name) is None else f"client-{name}"[:MAX_ID_LENGTH].strip("-._")


def folded(name: str) -> str:
    """What two names share that some file system, or a person, would take for one: case and Unicode form are gone."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


class NameBook:
    """Names as they are spelt first; another spelling of a known one is told."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._spelt = {folded(name): name for name in names}

    def add(self, name: str) -> None:
        self._spelt.setdefault(folded(name), name)

    def clash(self, name: str) -> str | None:
        """Why `name` cannot stand beside the names that are known, or None: it is one of them, or unlike them all."""
        known = self._spelt.get(folded(name), name)
        return None if known == name else f"client id {name!r}: is {known!r} but for case or Unicode form; rename it"
