"""Functional evidence of a round on disk, beside the round's updates: what aggregation of an open round reads."""
# SPDX-License-Identifier: Apache-2.0

import json
from dataclasses import astuple
from pathlib import Path

from fedlora_hf.errors import RecordError
from fedlora_hf.numerics.evidence import Evidence
from fedlora_hf.rounds.judges import Effect, Functional
from fedlora_hf.util.disk import read_json, write_atomically

NAME = "functional.json"
MAX_BYTES = 64 * 1024 * 1024


def write_functional(folder: Path, found: Functional) -> None:
    content = {
        "evidence": {client: list(item) for client, item in found.evidence.items()},
        "effects": {client: astuple(item) for client, item in found.effects.items()},
        "facts": dict(found.facts),
    }
    write_atomically(folder / NAME, json.dumps(content).encode())


def read_functional(folder: Path) -> Functional:
    """Empty where there is none; RecordError for a file that is not readable as such."""
    path = folder / NAME
    if not path.is_file():
        return Functional()
    try:
        content = read_json(path, MAX_BYTES)
        return Functional(
            {
                client: Evidence(float(s), None if t is None else float(t))
                for client, (s, t) in content["evidence"].items()
            },
            {client: Effect(int(n), int(of), float(c)) for client, (n, of, c) in content["effects"].items()},
            dict(content["facts"]),
        )
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise RecordError(f"{path}: not readable ({type(error).__name__}); remove it") from None
