"""Bad run records: texts for run.json, generated from a seed out of a sound one."""
# SPDX-License-Identifier: Apache-2.0

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

ODD: list[Any] = [
    None,
    True,
    7,
    -1.5,
    "x",
    [],
    [1, [2]],
    {},
    {"a": {"b": []}},
    "\u202e\x1b[2J\0",
    10**400,
    float("nan"),
]
IDS = [
    "../../x",
    "/etc/passwd",
    "a\0b",
    "\u202egnp",
    "caf\u00e9",
    "cafe\u0301",
    "",
    ".",
    "..",
    "x" * 10_000,
    "<script>",
    "CON",
]
DEEP = 100_000


def texts(sound: dict[str, Any], seed: int = 0) -> list[tuple[str, bytes]]:
    """(name, content of run.json) of every case."""
    rng = random.Random(seed)
    text = json.dumps(sound, indent=1)
    cases = [("empty", b""), ("a list", b"[]"), ("null", b"null"), ("text", b'"x"'), ("two", (text + text).encode())]
    cases += [("utf-16", text.encode("utf-16")), ("latin-1", text.replace("loss", "l\u00f6ss").encode("latin-1"))]
    cases += [(f"cut{n}", text[: int(rng.random() * len(text))].encode()) for n in range(12)]
    cases += [(f"flipped{n}", flipped(text.encode(), rng)) for n in range(30)]
    cases += [
        ("deep", b"[" * DEEP + b"]" * DEEP),
        ("deep inside", text.replace('"train"', "[" * DEEP + "]" * DEEP, 1).encode()),
    ]
    cases += [("bomb", b"[" + b"[]," * 3_000_000 + b"[]]"), ("large", text.encode() + b" " * (65 << 20))]
    cases += [("surrogate", text.replace("train", "\\ud800", 1).encode())]
    cases += [("huge number", text.replace(": 1,", ": " + "9" * 5000 + ",", 1).encode())]
    cases += [(name, json.dumps(record).encode()) for name, record in records(sound, rng)]
    return cases


def flipped(content: bytes, rng: random.Random) -> bytes:
    found = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        found[rng.randrange(len(found))] ^= 1 << rng.randrange(7)
    return bytes(found)


def records(sound: dict[str, Any], rng: random.Random) -> Iterator[tuple[str, Any]]:
    """Records with a field missing, of another type, or, anywhere inside, with something odd in its place."""
    for name in sound:
        yield f"no {name}", {key: value for key, value in sound.items() if key != name}
        for number, value in enumerate(rng.sample(ODD, 3)):
            yield f"{name} odd{number}", {**sound, name: value}
    for number in range(60):
        yield f"inside{number}", inside(sound, rng)
    for version in (0, 2, "1", 1.5, None):
        yield f"schema {version}", {**sound, "schema_version": version}
    client = next(iter(sound["clients"].values()))
    for number, odd in enumerate(IDS):
        yield f"client id{number}", {**sound, "clients": {**sound["clients"], odd: client}, "flagged": [odd]}
        yield f"cohort id{number}", {**sound, "rounds": [{**entry, "cohort": [odd]} for entry in sound["rounds"]]}
    yield "many clients", {**sound, "clients": {f"c{n}": client for n in range(3000)}}
    yield "many modules", {**sound, "modules": {f"m{n}": {"rank": 2, "spectrum": [1.0]} for n in range(3000)}}
    yield "long text", {**sound, "method": "m" * 1_000_000, "model": {"name_or_path": "n" * 1_000_000}}


def inside(sound: dict[str, Any], rng: random.Random) -> Any:
    """A copy with one value somewhere below the top replaced, or its key."""
    record = copy.deepcopy(sound)
    at: Any = record[rng.choice([name for name in record if isinstance(record[name], dict | list) and record[name]])]
    while True:
        key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
        below = at[key]
        if not isinstance(below, dict | list) or not below or rng.random() < 0.3:
            break
        at = below
    if isinstance(at, dict) and rng.random() < 0.3:
        at[rng.choice(IDS)] = at.pop(key)
    else:
        at[key] = rng.choice(ODD)
    return record
