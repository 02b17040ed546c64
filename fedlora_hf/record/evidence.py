"""Evidence on clients, to and from the record."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping

from fedlora_hf.aggregation.cohort import PastRound
from fedlora_hf.numerics.evidence import Evidence, Kind
from fedlora_hf.record.record import RunRecord

Plain = dict[str, dict[str, dict[str, float | None]]]


def plain_evidence(
    found: Mapping[str, Mapping[str, Evidence]], functional: Mapping[str, Evidence] | None = None
) -> Plain:
    """{client: {kind: {"score", "threshold"}}} as the record has it; `functional` is one more kind of each client's."""
    plain: Plain = {}
    for client, kinds in found.items():
        more: dict[str, Evidence] = {}
        if functional and client in functional:
            more[Kind.FUNCTIONAL] = functional[client]
        plain[client] = {
            str(kind): {"score": item.score, "threshold": item.threshold} for kind, item in {**kinds, **more}.items()
        }
    return plain


def past_rounds(record: RunRecord, before: int, since: int = 0) -> list[PastRound]:
    """What the rounds from `since` to the one before `before` found, oldest first, as `aggregate` takes it."""
    return [
        PastRound(
            {
                client: {
                    kind: Evidence(item["score"], item["threshold"])
                    for kind, item in kinds.items()
                    if item["score"] is not None
                }
                for client, kinds in entry["evidence"].items()
            },
            frozenset(entry["flagged"]),
        )
        for entry in record.rounds
        if since <= entry["round"] < before and not entry.get("thinned")
    ]
