"""What a card tells of a run, drawn from its record: numbers and short texts, whatever the record holds.

A record may come from somebody else's repository: a value of an unexpected type is left out, never an error.
"""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from fedlora_hf.hub.text import markdown
from fedlora_hf.numerics.evidence import Kind
from fedlora_hf.record.group_names import group_names
from fedlora_hf.record.record import RunRecord

MAX_ROWS = 50
_STATES = {
    ("before", "global"): "before",
    ("after", "local"): "each client alone",
    ("after", "global"): "global adapter",
    ("after", "personalised"): "personal adapters",
}


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether `value` is a finite number (True and False are not)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def privacy_told(privacy: Mapping[str, Any]) -> str:
    """What a record's `privacy` comes to, in one line; "" when there is nothing to tell."""
    value, delta = privacy.get("epsilon"), privacy.get("delta")
    if is_number(value) and is_number(delta):
        return f"epsilon {value:.3g} at delta {delta:g}, for a client in {privacy.get('rounds')} rounds"
    return f"no guarantee: {privacy['note']}" if privacy.get("note") else ""


def mapping(value: object) -> Mapping[str, Any]:
    """`value` when it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def sequence(value: object) -> list[Any]:
    """`value` when it is a list, the keys of a mapping, else nothing."""
    return list(value) if isinstance(value, list | Mapping) else []


def numbers(value: object) -> dict[str, float]:
    """The entries of a mapping that are numbers."""
    return {name: item for name, item in mapping(value).items() if is_number(item)}


def texts(value: object) -> dict[str, str]:
    """The entries of a mapping that are texts."""
    return {name: item for name, item in mapping(value).items() if isinstance(item, str)}


def wording(record: RunRecord) -> dict[str, str]:
    """{"template": whose chat template worded the examples, "own": our own words for a question}, "" for neither."""
    said = texts(record.data.get("wording"))
    template = said.get("chat_template", "none")
    return {"template": template, "own": ""} if template != "none" else {"template": "", "own": said.get("example", "")}


def bases(record: RunRecord) -> dict[str, Any]:
    """{"count": how many base models the adapters of a collection name, 0 where it is one, "named": [(of a path its
    last part, how many adapters name it)]}; a pushed record has the count alone."""
    found, count = mapping(record.model.get("bases")), record.model.get("num_bases")
    named = [(str(name).rstrip("/\\").replace("\\", "/"), clients) for name, clients in found.items()]
    rows = [
        (name.rsplit("/", 1)[-1] if name.startswith(("/", ".", "~")) or name.count("/") > 1 else name, len(clients))
        for name, clients in named
        if isinstance(clients, list)
    ]
    return {"count": count if isinstance(count, int) and count > 1 else 0, "named": rows}


def number(value: object) -> str:
    """A number as shown in tables: four significant digits; a dash for what is missing."""
    if not is_number(value):
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def plain_items(value: object) -> list[tuple[str, str]]:
    """The entries of a mapping that can be shown in a line: scalars, and short lists of them."""
    shown = []
    for name, entry in mapping(value).items():
        items = entry if isinstance(entry, list) else [entry]
        if entry is None or entry == [] or not all(isinstance(item, str | int | float) for item in items):
            continue
        text = ", ".join(number(item) if isinstance(item, float) else str(item) for item in items[:20])
        shown.append((name, text + (" ..." if len(items) > 20 else "")))
    return shown


def groups(record: RunRecord) -> list[dict[str, Any]]:
    """{"name", "clients": how many} of the groups besides the first after the last round, whoever is in them."""
    told = mapping(record.rounds[-1].get("groups")) if record.rounds else {}
    found = []
    for name in group_names(record):
        facts = mapping(told.get(name))
        count = facts.get("members", len(sequence(facts.get("clients"))))
        found.append({"name": name, "clients": count if is_number(count) else 0})
    return found


def results(record: RunRecord) -> dict[str, Any]:
    """{"states": column titles, "rows": [(metric, [value or None])]} of the means over the collaborative clients."""
    columns = {title: numbers(mapping(record.metrics.get(stage)).get(kind)) for (stage, kind), title in _STATES.items()}
    columns = {title: values for title, values in columns.items() if values}
    metrics = sorted({metric for values in columns.values() for metric in values})
    return {
        "states": list(columns),
        "rows": [(metric, [values.get(metric) for values in columns.values()]) for metric in metrics],
    }


def rejected(record: RunRecord) -> list[dict[str, Any]]:
    """One row a client left out: the evidence on it or the reason."""
    flagged = [str(name) for name in record.flagged]
    names = [*flagged, *(name for name in record.quarantined if name not in flagged)]
    return [
        {
            "id": name,
            "judged": "quarantined" if name in record.quarantined else "flagged",
            "reason": record.quarantined.get(name, ""),
            "evidence": _evidence(mapping(record.clients.get(name)).get("evidence")),
        }
        for name in names
    ]


def claims(record: RunRecord) -> list[tuple[str, str]]:
    """(client, what it claimed and what was made of it) of those who claim far more examples than the others."""
    found = [(name, mapping(client).get("outlier_claim")) for name, client in sorted(record.clients.items())]
    return [(name, said) for name, said in found if isinstance(said, str) and said]


def rehearsed(record: RunRecord) -> dict[str, Any]:
    """{"count", "named": [(client, how)]} of clients contaminated on purpose; a public record has the count alone."""
    named = [(name, mapping(client).get("contaminated")) for name, client in sorted(record.clients.items())]
    found = [(name, how) for name, how in named if isinstance(how, str) and how]
    known = numbers(record.data.get("cohort")).get("rehearsed", 0)
    return {"count": len(found) or int(known), "named": found}


def _evidence(value: object) -> str:
    """Each kind's score against its threshold, as inert Markdown."""
    evidence = mapping(value)
    parts = []
    for kind in [*Kind, *sorted(set(evidence) - set(Kind))]:
        score, threshold = (mapping(evidence.get(kind)).get(name) for name in ("score", "threshold"))
        if not is_number(score):
            continue
        shown = f"{markdown(kind, 40)} {number(score)}"
        if is_number(threshold) and score > threshold:
            shown = f"**{shown} &gt; {number(threshold)}**"
        elif is_number(threshold):
            shown = f"{shown} ≤ {number(threshold)}"
        parts.append(shown)
    return "; ".join(parts)


def rounds(record: RunRecord) -> list[dict[str, Any]]:
    """One row a round, the last MAX_ROWS of them."""
    return [_round(entry) for entry in record.rounds[-MAX_ROWS:]]


def _round(entry: Mapping[str, Any]) -> dict[str, Any]:
    losses = list(numbers(entry.get("train_loss")).values())
    sent = [amount for name in ("bytes_up", "bytes_down") for amount in _amounts(entry.get(name))]
    return {
        "round": entry.get("round"),
        "stage": entry.get("stage") or "-",
        "clients": entry["cohort"] if is_number(entry.get("cohort")) else len(sequence(entry.get("cohort"))),
        "flagged": _names(entry.get("flagged")),
        "quarantined": _names(entry.get("quarantined")),
        "loss": sum(losses) / len(losses) if losses else None,
        "megabytes": sum(sent) / 1e6 if sent else None,
        "seconds": entry.get("seconds"),
    }


def _names(value: object) -> str:
    """Names, or how many where a record does not name them; a dash for none."""
    return str(value or "-") if is_number(value) else ", ".join(map(str, sequence(value))) or "-"


def _amounts(value: object) -> list[float]:
    """A total, or amounts by client."""
    return [value] if is_number(value) else list(numbers(value).values())


def modules(record: RunRecord) -> dict[str, Any]:
    """Count, range of the ranks and the largest discarded energy of the adapted modules."""
    ranks = [entry["rank"] for entry in record.modules.values() if is_number(entry.get("rank"))]
    lost = [entry["discarded_energy"] for entry in record.modules.values() if is_number(entry.get("discarded_energy"))]
    low, high = (min(ranks), max(ranks)) if ranks else (None, None)
    return {
        "count": len(record.modules),
        "ranks": None if low is None else number(low) if low == high else f"{number(low)} to {number(high)}",
        "discarded": max(lost) if lost else None,
    }
