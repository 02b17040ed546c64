"""Long runs: the record keeps every round, and what each client did in the recent ones, so that it stays bounded."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping
from typing import Any

# Clients' turns (rounds x clients) told in full, some 1 KB each in run.json; of older rounds who took part, who was
# left out, losses and bytes, some 120 B. Runs of up to 100 clients and 100 rounds are told in full [our choice].
DETAILED_TURNS = 10_000
# Per-module evidence against every client, of the last round: modules x clients.
DETAILED_MODULES = 20_000
# Of older rounds none of it is read again but the evidence, by clair, whose judgement then rests on the recent ones.
_DETAILS: tuple[str, ...] = ("weights", "influence", "claimed_weights", "evidence", "combined_evidence")
_DETAILS += ("update_norm", "collaborative", "effects", "judging")


def thin(rounds: list[dict[str, Any]], turns: int = DETAILED_TURNS) -> None:
    """Take the details out of the rounds before the last ones that have `turns` turns together; the last keeps its own.

    A thinned entry says "thinned": true; its emptied fields keep their types.
    """
    seen = 0
    for place in range(len(rounds) - 1, -1, -1):
        entry = rounds[place]
        seen += len(entry["cohort"])
        if entry.get("thinned"):
            return
        if seen > turns and place < len(rounds) - 1:
            entry |= {name: type(entry[name])() for name in _DETAILS if name in entry}
            entry["thinned"] = True


def thinned_modules(modules: Mapping[str, Any], clients: int) -> dict[str, Any]:
    """The modules without their evidence against every client, where that is more than DETAILED_MODULES entries."""
    if len(modules) * clients <= DETAILED_MODULES:
        return dict(modules)
    return {name: {key: value for key, value in facts.items() if key != "evidence"} for name, facts in modules.items()}
