"""The record as the report reads it: typed, every absent, null or malformed value left out rather than fatal."""
# SPDX-License-Identifier: Apache-2.0

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fedlora_hf.numerics.evidence import Kind
from fedlora_hf.record.record import RunRecord

VIEWS = ("before", "global", "personalised", "local")
COLLABORATIVE, LEFT_OUT, FLAGGED, QUARANTINED = "collaborative", "left out", "flagged", "quarantined"
STATES = (COLLABORATIVE, LEFT_OUT, FLAGGED, QUARANTINED)
# What people look at first; any other metric follows in alphabetical order.
_METRIC_ORDER = ("loss", "accuracy", "token_accuracy", "rouge_l", "perplexity")
_NOT_METRICS = {"num_items"}  # counts, which evaluation returns beside its metrics
# Key of a number that was recorded for the whole cohort and not client by client.
COHORT = ""
NEAR = 0.7  # share of a threshold worth telling, where the record itself does not say who is near a line (our choice)

Values = dict[str, float]


def mapping(value: Any) -> dict[str, Any]:
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}


def sequence(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def number(value: Any) -> float | None:
    """`value` as a finite float; None for anything else (true and false are not numbers here)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def values(value: Any) -> Values:
    """{client: number} from such a mapping, or {COHORT: number} from a single number."""
    single = number(value)
    if single is not None:
        return {COHORT: single}
    found = {key: number(item) for key, item in mapping(value).items()}
    return {key: item for key, item in found.items() if item is not None}


def total(value: Any) -> float | None:
    found = values(value)
    return math.fsum(found.values()) if found else None


def mean(items: Iterable[float]) -> float | None:
    found = list(items)
    return math.fsum(found) / len(found) if found else None


def natural(text: str) -> list[tuple[int, int, str]]:
    """Sort key: client-2 before client-10. Digits beyond any sensible count are compared as text."""
    parts = re.findall(r"[0-9]{1,18}|[^0-9]+", text)
    return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts]


def lower_is_better(metric: str) -> bool:
    return "loss" in metric or "perplexity" in metric


def metric_order(names: Iterable[str]) -> list[str]:
    known = {name: place for place, name in enumerate(_METRIC_ORDER)}
    return sorted(set(names) - _NOT_METRICS, key=lambda name: (known.get(name, len(known)), name))


@dataclass(frozen=True)
class Score:
    """One kind of evidence against a client; without a threshold the kind was not used."""

    score: float
    threshold: float | None

    @property
    def above(self) -> bool:
        return self.threshold is not None and self.score > self.threshold


@dataclass(frozen=True)
class Client:
    """One client at the end of the run; metrics are {view: {metric: value}}."""

    id: str
    state: str
    reason: str
    weight: float | None
    influence: float | None
    suspicion: tuple[str, float] | None
    num_examples: float | None
    claimed_weight: float | None
    outlier_claim: str
    evidence: dict[str, Score]
    effect: tuple[int, int, float] | None
    metrics: dict[str, Values]
    name: str = ""
    group: str = ""

    @property
    def title(self) -> str:
        """Its name in the data, and its id where that is another."""
        return f"{self.name} ({self.id})" if self.name else self.id


@dataclass(frozen=True)
class Round:
    """One committed round; metrics are {view: {metric: {client or COHORT: value}}}."""

    number: int
    stage: str
    cohort: list[str]
    flagged: list[str]
    quarantined: list[str]
    train_loss: Values
    update_norm: Values
    metrics: dict[str, dict[str, Values]]
    bytes_up: float | None
    bytes_down: float | None
    seconds: Values
    n_iter: float | None
    converged: bool


@dataclass(frozen=True)
class Run:
    """The whole record: clients sorted by state and natural order of their ids, rounds in their order."""

    record: RunRecord
    clients: list[Client]
    rounds: list[Round]

    @classmethod
    def of(cls, record: RunRecord) -> "Run":
        clients = _clients(record)
        ids = {client.id for client in clients}
        return cls(record, clients, [_round(entry, n, ids) for n, entry in enumerate(record.rounds, 1)])

    def having(self, state: str) -> list[Client]:
        return [client for client in self.clients if client.state == state]

    @property
    def suspicious(self) -> list[Client]:
        """Clients not flagged whose evidence is near a line, the nearest first."""
        found = [(client.suspicion[1], client) for client in self.clients if client.suspicion is not None]
        return [client for _, client in sorted(found, key=lambda pair: -pair[0])]

    @property
    def kinds(self) -> list[str]:
        """The kinds of evidence that anybody has a score of, the three known ones first."""
        found = {kind for client in self.clients for kind in client.evidence}
        return [kind for kind in Kind if kind in found] + sorted(found - set(Kind))

    def mean_metric(self, entry: Round, view: str, metric: str) -> float | None:
        """Mean over the clients that were not flagged (all of them, where only the cohort's number is known)."""
        found = entry.metrics.get(view, {}).get(metric, {})
        bad = {client.id for client in self.having(FLAGGED)}
        return mean(value for client, value in found.items() if client not in bad)

    def before(self, metric: str) -> float | None:
        """The metric of the base model, before any training."""
        found = mapping(mapping(self.record.metrics.get("before")).get("global"))
        return number(found.get(metric))

    def after(self, view: str, metric: str) -> float | None:
        found = mapping(mapping(self.record.metrics.get("after")).get(view))
        return number(found.get(metric))

    def metrics_after(self, view: str) -> list[str]:
        """The metrics whose means are known at the end of the run."""
        return metric_order(mapping(mapping(self.record.metrics.get("after")).get(view)))

    @property
    def stages(self) -> list[tuple[str, list[Round]]]:
        """Runs of consecutive rounds of one stage."""
        found: list[tuple[str, list[Round]]] = []
        for entry in self.rounds:
            if not found or found[-1][0] != entry.stage:
                found.append((entry.stage, []))
            found[-1][1].append(entry)
        return found


def _evidence(value: Any) -> dict[str, Score]:
    found = {}
    for kind, entry in mapping(value).items():
        score = number(mapping(entry).get("score"))
        if score is not None:
            found[kind] = Score(score, number(mapping(entry).get("threshold")))
    return found


def _suspicion(value: Any) -> tuple[str, float] | None:
    """(kind of evidence, share of the way to its line), or None."""
    share = number(mapping(value).get("of_line"))
    return None if share is None else (str(mapping(value).get("kind", "")), share)


def effect(value: Any) -> tuple[int, int, float] | None:
    """(others whose loss the client's share raises, of how many, by which share of it, the median), or None."""
    found = [number(mapping(value).get(name)) for name in ("raised", "judges", "change")]
    raised, judges, change = found
    if raised is None or judges is None or change is None or not 0 <= raised <= judges < 1e9:
        return None
    return int(raised), int(judges), change


def _near(evidence: dict[str, Score]) -> tuple[str, float] | None:
    """The same from the scores, for a record that does not name who is near a line."""
    shares = {kind: item.score / item.threshold for kind, item in evidence.items() if item.threshold}
    kind = max(shares, key=lambda name: shares[name], default="")
    return (kind, shares[kind]) if kind and shares[kind] >= NEAR else None


def _clients(record: RunRecord) -> list[Client]:
    flagged = {str(client_id) for client_id in record.flagged}
    last = mapping(record.rounds[-1].get("evidence")) if record.rounds else {}
    names = mapping(record.data.get("names"))
    told = bool(record.suspicious) or any("suspicious" in entry for entry in record.rounds)
    found = []
    for client_id in {*record.clients, *flagged, *record.quarantined}:
        entry = record.clients.get(client_id, {})
        state = COLLABORATIVE if entry.get("collaborative") is not False else LEFT_OUT
        state = QUARANTINED if client_id in record.quarantined else FLAGGED if client_id in flagged else state
        evidence = _evidence(entry.get("evidence")) or _evidence(last.get(client_id))
        near = _suspicion(record.suspicious.get(client_id)) if told else _near(evidence)
        found.append(
            Client(
                id=str(client_id),
                state=state,
                reason=str(record.quarantined.get(client_id, "")),
                weight=number(entry.get("weight")),
                influence=number(entry.get("influence")),
                group=str(entry.get("group", "")),
                suspicion=near if state == COLLABORATIVE else None,
                num_examples=number(entry.get("num_examples")),
                claimed_weight=number(entry.get("claimed_weight")),
                outlier_claim=str(entry.get("outlier_claim") or ""),
                evidence=evidence,
                effect=effect(entry.get("effect")),
                metrics={view: values(item) for view, item in mapping(entry.get("metrics")).items()},
                name=str(names.get(str(client_id), "")),
            )
        )
    return sorted(found, key=lambda client: (STATES.index(client.state), natural(client.id), client.id))


def _by_metric(value: Any, ids: set[str]) -> dict[str, Values]:
    """{metric: {client: value}} from that, from {client: {metric: value}}, or from {metric: mean}."""
    found: dict[str, Values] = {}
    for key, item in mapping(value).items():
        for inner, amount in values(item).items():
            metric, client = (inner, key) if key in ids and inner != COHORT else (key, inner)
            found.setdefault(metric, {})[client] = amount
    return found


def _round(entry: dict[str, Any], position: int, ids: set[str]) -> Round:
    place, quarantined = number(entry.get("round")), entry.get("quarantined")
    return Round(
        number=position if place is None else int(place),
        stage=str(entry.get("stage") or ""),
        cohort=[str(item) for item in sequence(entry.get("cohort"))],
        flagged=[str(item) for item in sequence(entry.get("flagged"))],
        quarantined=[str(item) for item in (mapping(quarantined) or sequence(quarantined))],
        train_loss=values(entry.get("train_loss")),
        update_norm=values(entry.get("update_norm")),
        metrics={view: _by_metric(item, ids) for view, item in mapping(entry.get("metrics")).items()},
        bytes_up=total(entry.get("bytes_up")),
        bytes_down=total(entry.get("bytes_down")),
        seconds=values(entry.get("seconds")),
        n_iter=number(entry.get("n_iter")),
        converged=entry.get("converged") is not False,
    )
