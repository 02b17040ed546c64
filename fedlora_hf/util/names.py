"""Client ids: what may be one. An id becomes a folder and a Hub path, so the rule is narrow and the same everywhere."""
# SPDX-License-Identifier: Apache-2.0

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

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
    """The nearest fit client id: accents are dropped, what is unfit becomes '-'; a name without any fit character, in
    Chinese for instance, is `client-` and a digest of it. Two texts may give one id; the caller checks."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    name = re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9._-]+", "-", bare)).strip("-._")[:MAX_ID_LENGTH].strip("-._")
    if name and unfit_reason(name) is None:
        return name
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"client-{name or digest}"[:MAX_ID_LENGTH].strip("-._")


def fit_ids(texts: Iterable[str]) -> dict[str, str]:
    """{text: fit client id}, all ids distinct also where case does not count; a second comer gets "-2", and so on."""
    ids: dict[str, str] = {}
    taken: set[str] = set()
    for text in sorted(map(str, texts)):
        name = base = fit_id(text)
        number = 1
        while name.lower() in taken:
            number += 1
            name = f"{base[: MAX_ID_LENGTH - len(str(number)) - 1]}-{number}"
        taken.add(name.lower())
        ids[text] = name
    return ids


def telling_names(paths: Sequence[Sequence[str]]) -> list[str]:
    """For each path, given by its steps, its shortest end that no other path has, as text.

    The last steps that all of them share (checkpoint-100, train) tell nothing and are left out first. Two equal paths
    keep equal names; the caller checks.
    """
    cut = list(map(tuple, paths))
    while len(set(cut)) > 1 and all(len(path) > 1 for path in cut) and len({path[-1] for path in cut}) == 1:
        cut = [path[:-1] for path in cut]
    ends = Counter(path[-size:] for path in set(cut) for size in range(1, len(path) + 1))
    sizes = [next((n for n in range(1, len(path)) if ends[path[-n:]] == 1), len(path)) for path in cut]
    return ["/".join(path[-size:]) for path, size in zip(cut, sizes, strict=True)]


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
