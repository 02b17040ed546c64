"""What each stage of a run trained, what a client sent, got and has to keep for it, and what it moved: from the record.

A record may come from somebody else's repository: a value of an unexpected type is left out, never an error.
"""
# SPDX-License-Identifier: Apache-2.0

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedlora_hf.record.record import RunRecord


@dataclass(frozen=True)
class StageCost:
    """One stage, or consecutive rounds of one. parts: what was trained, as far as recorded.

    up, down: bytes of all its rounds, stored: bytes of one, each the mean over clients; None where not recorded.
    moved: {part: mean over the rounds (personal: over the clients)} of `changes.component_changes`.
    """

    stage: str
    rounds: str
    parts: str
    up: float | None
    down: float | None
    stored: float | None
    moved: dict[str, float]


def stage_costs(record: RunRecord) -> list[StageCost]:
    """The stages of a run, in their order; the personal one last, where clients took steps of their own."""
    found = []
    for stage, group in itertools.groupby(record.rounds, lambda entry: str(entry.get("stage") or "training")):
        entries = list(group)
        numbers = [str(entry.get("round")) for entry in (entries[0], entries[-1])]
        per_round = {
            name: [mean for entry in entries if (mean := _mean(_numbers(entry.get(name)).values())) is not None]
            for name in ("bytes_up", "bytes_down", "bytes_stored")
        }
        found.append(
            StageCost(
                stage,
                " to ".join(dict.fromkeys(numbers)),
                ", ".join(part for part in _list(entries[0].get("parts")) if isinstance(part, str)),
                sum(per_round["bytes_up"]) if per_round["bytes_up"] else None,
                sum(per_round["bytes_down"]) if per_round["bytes_down"] else None,
                _mean(per_round["bytes_stored"]),
                _means(_numbers(entry.get("changed")) for entry in entries),
            )
        )
    return found + _personal(record)


def _personal(record: RunRecord) -> list[StageCost]:
    """The stage of the personal steps. It sends nothing: what it starts from came with the last round."""
    facts = [entry["personal"] for entry in record.clients.values() if isinstance(entry.get("personal"), Mapping)]
    parts = [part for item in facts for part in _list(item.get("parts")) if isinstance(part, str)]
    if not parts:
        return []
    stored = _mean(_numbers({str(n): item.get("bytes_stored") for n, item in enumerate(facts)}).values())
    moved = _means(_numbers(item.get("changed")) for item in facts)
    return [StageCost("personal", "after", ", ".join(dict.fromkeys(parts)), 0.0, 0.0, stored, moved)]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _numbers(value: Any) -> dict[str, float]:
    """The entries of a mapping that are finite numbers."""
    items = value.items() if isinstance(value, Mapping) else ()
    return {
        str(key): item
        for key, item in items
        if isinstance(item, int | float) and not isinstance(item, bool) and math.isfinite(item)
    }


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return math.fsum(found) / len(found) if found else None


def _means(found: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every key that any of them has, over those that have it."""
    rows = list(found)
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: math.fsum(row[key] for row in rows if key in row) / sum(key in row for row in rows) for key in keys}
