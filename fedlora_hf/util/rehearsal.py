"""Which of one's own clients are contaminated on purpose, and how: `--contaminate client=kind[:strength]`.

A rehearsal: what a federation would stand is found out before a real one. Everything here is read from the options
alone, so that a client, the server and the record know the same.
"""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from fedlora_hf.errors import ConfigError, one_line

# Kinds of wrong data (data/contaminate.py says what each does), and those that have no strength.
DATA_KINDS = ("random_outputs", "constant", "shuffled", "shuffled_labels", "random_labels")
PLAIN = ("zero",)


class Contamination(NamedTuple):
    """kind: of wrong data, or of attack on an update. strength: see the kind; None: the kind's own default."""

    kind: str
    strength: float | None = None

    def __str__(self) -> str:
        return self.kind if self.strength is None else f"{self.kind}:{self.strength:g}"


def read_contaminate(given: Sequence[str] | str | None, kinds: Iterable[str]) -> dict[str, Contamination]:
    """{client: contamination}, sorted, from CLIENT=KIND[:STRENGTH] words; ConfigError, one line, for what is none.

    A client's name may hold "=" and ":": the last "=" counts, and after it the first ":".
    """
    found: dict[str, Contamination] = {}
    words = given.split() if isinstance(given, str) else list(given or ())
    known = sorted(kinds)
    for word in words:
        client, equals, text = word.rpartition("=")
        kind, colon, strength = text.partition(":")
        if not (client and equals and kind):
            raise ConfigError(f"contaminate {one_line(word, 80)!r}: must be CLIENT=KIND or CLIENT=KIND:STRENGTH")
        if client in found:
            raise ConfigError(f"contaminate {one_line(word, 80)!r}: this client is named twice; leave one out")
        if kind not in known:
            raise ConfigError(f"contaminate {one_line(word, 80)!r}: kind must be one of {', '.join(known)}")
        if colon and kind in PLAIN:
            raise ConfigError(f"contaminate {one_line(word, 80)!r}: {kind} has no strength; write {client}={kind}")
        found[client] = Contamination(kind, _number(word, strength) if colon else None)
    return dict(sorted(found.items()))


def check_clients(contaminated: Mapping[str, Contamination], clients: Iterable[str]) -> None:
    """ConfigError for a contaminated client that is none of the run's."""
    names = sorted(clients)
    for client in contaminated:
        if client not in names:
            raise ConfigError(
                f"contaminate {one_line(client, 80)!r}: is none of the clients ({', '.join(names[:5])}"
                f"{', ...' if len(names) > 5 else ''}); name one of them"
            )


def _number(word: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"contaminate {one_line(word, 80)!r}: strength must be a finite number; 10 for instance")
    return value
