"""Groups of clients, each with a global adapter of its own, to and from the record."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping
from typing import Any

from fedlora_hf.aggregation.groups import Standing
from fedlora_hf.errors import RecordError
from fedlora_hf.methods.clair import FIRST
from fedlora_hf.record.record import RunRecord
from fedlora_hf.update import AdapterState, Group


def plain_groups(groups: Mapping[str, Group]) -> dict[str, dict[str, Any]]:
    """{name: {"clients", "since", "within", "between"}} as a round's entry has it."""
    return {
        name: {"clients": list(group.clients), "since": group.since, "within": group.within, "between": group.between}
        for name, group in groups.items()
    }


def standing_groups(
    record: RunRecord, number: int, first: AdapterState | None, states: Mapping[str, AdapterState]
) -> dict[str, Standing]:
    """The groups as they stand before round `number`, by name.

    first: the adapter that the first group starts from; None: nothing. states: the other groups'. RecordError where
    the record names a group without an adapter.
    """
    told = record.rounds[number - 2].get("groups") if number > 1 else None
    if not told:
        return {FIRST: Standing((), first)}
    if lost := sorted(set(told) - set(states) - {FIRST}):
        raise RecordError(f"round {number - 1}: the adapter of group {lost[0]} is missing; resume from another round")
    return {
        name: Standing(tuple(facts["clients"]), first if name == FIRST else states[name], int(facts["since"]))
        for name, facts in sorted(told.items(), key=lambda item: int(item[0]))
    }
