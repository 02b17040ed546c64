"""How the clients of a run stand by its record: who collaborates, and where each one's last update is."""
# SPDX-License-Identifier: Apache-2.0

from dataclasses import replace
from typing import Any

from fedlora_hf.record.record import RunRecord


def update_standing(record: RunRecord) -> None:
    """Set flagged, quarantined and every client's standing from the last round that each client took part in."""
    flagged: set[str] = set()
    quarantined: dict[str, str] = {}
    suspicious: dict[str, dict[str, Any]] = {}
    for entry in record.rounds:
        for name, group in (entry.get("groups") or {}).items():
            for client in group["clients"]:
                record.clients[client]["group"] = name
        for client in entry["cohort"]:
            facts = record.clients[client]
            flagged.discard(client)
            quarantined.pop(client, None)
            suspicious.pop(client, None)
            if client in entry.get("suspicious", {}):
                suspicious[client] = entry["suspicious"][client]
            if client in entry["quarantined"]:
                quarantined[client] = entry["quarantined"][client]
            elif client in entry["flagged"]:
                flagged.add(client)
            if not entry.get("thinned"):  # else they stand as they were found then
                facts["weight"] = entry["weights"].get(client, 0.0)
                facts["claimed_weight"] = (entry.get("claimed_weights") or {}).get(client)
                facts["outlier_claim"] = (entry.get("outlier_claims") or {}).get(client, "")
                facts["evidence"] = entry["combined_evidence"].get(client, {})
                facts.pop("effect", None)
                if client in (entry.get("effects") or {}):
                    facts["effect"] = entry["effects"][client]
                if client in entry.get("influence", {}):
                    facts["influence"] = entry["influence"][client]
    for client, facts in record.clients.items():
        facts["collaborative"] = client not in flagged and client not in quarantined
    record.flagged, record.quarantined = sorted(flagged), dict(sorted(quarantined.items()))
    record.suspicious = dict(sorted(suspicious.items()))


def collaborative(record: RunRecord) -> list[str]:
    """Sorted ids of the clients that are neither flagged nor quarantined."""
    return sorted(client for client, facts in record.clients.items() if facts["collaborative"])


def last_rounds(record: RunRecord) -> dict[str, int]:
    """{client id: the last round it left a usable update in}."""
    last = {}
    for entry in record.rounds:
        for client in entry["cohort"]:
            if client not in entry["quarantined"]:
                last[client] = entry["round"]
    return last


def needed_updates(record: RunRecord, keep: int) -> set[tuple[int, str]]:
    """(round, client id) of every client's last update, as it stood after each of the last `keep` rounds.

    Whoever goes on from one of those rounds finds what the clients had then.
    """
    ends = range(max(1, len(record.rounds) - keep + 1), len(record.rounds) + 1)
    views = [replace(record, rounds=record.rounds[:end]) for end in ends]
    return {(number, client) for view in views for client, number in last_rounds(view).items()}
