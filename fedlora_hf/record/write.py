"""What goes into the run record, and what is read back from it: pure functions over records, updates and aggregates."""
# SPDX-License-Identifier: Apache-2.0

import datetime
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedlora_hf import privacy
from fedlora_hf.aggregation.cohort import PastRound
from fedlora_hf.aggregation.method import Method
from fedlora_hf.errors import ConfigError
from fedlora_hf.numerics import direction, lowrank
from fedlora_hf.record.record import RunRecord, plain, versions
from fedlora_hf.record.thinning import thin, thinned_modules
from fedlora_hf.training.metrics import mean_metrics
from fedlora_hf.update import AdapterState, Aggregate, ClientUpdate, Evidence, LoraFactors
from fedlora_hf.util.redaction import redacted

# Options that may differ between a run and its resumption, because they move no number of the rounds before.
_FREE = {"num_rounds", "keep_rounds", "personalise", "personal_steps", "evaluate_rounds", "generation_examples"}
_FREE |= {"global_rounds", "personal_learning_rate"}
_FREE |= {"max_new_tokens", "max_eval_examples", "resume_from", "server_min_clients", "client_timeout"}
MAX_SIMILARITY = 256


def opening(
    args: Any,
    method: Method,
    facts: Mapping[str, Any],
    num_examples: Mapping[str, int | None],
    adapter: Mapping[str, Any],
) -> RunRecord:
    """The record of a run that is about to begin. `facts`: what only the caller knows; its keys are record fields."""
    record = RunRecord(
        kind="train",
        method=method.name,
        seed=args.seed,
        method_info={"title": method.title, "paper": method.paper, "averages": method.averages},
        options=plain(args.changed()),
        command=redacted([Path(sys.argv[0]).name.replace("__main__.py", "fedlora"), *sys.argv[1:]]),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=versions(),
        adapter=dict(adapter),
        clients={client: newcomer(count) for client, count in num_examples.items()},
    )
    for name, value in facts.items():
        setattr(record, name, value)
    return record


def newcomer(num_examples: int | None) -> dict[str, Any]:
    """What is known of a client that has sent nothing yet."""
    return {"collaborative": True, "weight": 0.0, "num_examples": num_examples, "evidence": {}, "metrics": {}}


def check_same_run(earlier: RunRecord, now: RunRecord) -> None:
    """Refuse to go on from a run with other data, clients, seed or options: its rounds would not be this run's."""
    for name in sorted((set(earlier.options) | set(now.options)) - _FREE):
        if earlier.options.get(name) != now.options.get(name):
            raise ConfigError(
                f"{name}={now.options.get(name)!r}: the run to resume has {earlier.options.get(name)!r}; pass the same"
            )
    for what, old, new in (
        ("seed", earlier.seed, now.seed),
        ("clients", sorted(earlier.clients), sorted(now.clients)),
    ):
        if old != new:
            raise ConfigError(f"{what}: {str(new)[:80]}; the run to resume has {str(old)[:80]}; pass the same")


def add_round(
    record: RunRecord,
    number: int,
    cohort: Sequence[str],
    updates: Sequence[ClientUpdate],
    combined: Aggregate,
    quarantined: Mapping[str, str],
    start: AdapterState | None,
    seconds: Mapping[str, float],
    *,
    stage: str = "federated",
    message_bytes: int | None = None,
    functional: Mapping[str, Evidence] | None = None,
) -> None:
    """Append what a round did, and bring the verdict on every client up to date.

    start: the adapter the round began with, None if there was none. message_bytes: what a client sends and is sent;
    default the whole of what it sent.
    """
    norms, cosines = compared(updates, start, combined.state)
    record.rounds.append(
        {
            "round": number,
            "stage": stage,
            "cohort": list(cohort),
            "collaborative": [u.client_id for u in updates if u.client_id not in combined.flagged],
            "flagged": list(combined.flagged),
            "quarantined": dict(quarantined),
            "weights": dict(combined.weights),
            "influence": dict(combined.influence),
            "suspicious": {
                client: {"kind": kind, "of_line": share} for client, (kind, share) in combined.suspicious.items()
            },
            "train_loss": {u.client_id: u.metrics["train_loss"] for u in updates if "train_loss" in u.metrics},
            "update_norm": norms,
            "evidence": with_functional(_plain(combined.this_round or combined.evidence), functional or {}),
            "combined_evidence": _plain(combined.evidence),
            "diagnosis": plain(combined.diagnosis),
            "n_iter": combined.n_iter,
            "converged": combined.converged,
            "bytes_up": {u.client_id: u.state.nbytes() if message_bytes is None else message_bytes for u in updates},
            "bytes_down": {}
            if start is None
            else dict.fromkeys(cohort, start.nbytes() if message_bytes is None else message_bytes),
            "changed": {} if start is None else component_changes(start, combined.state),
            "seconds": dict(seconds),
            "metrics": {},
        }
    )
    record.modules = plain(thinned_modules(combined.modules, len(updates)))
    record.diagnosis = plain(combined.diagnosis)
    record.similarity = cosines
    record.privacy = privacy.account(record.options, record.rounds)
    judge(record)
    thin(record.rounds)


def judge(record: RunRecord) -> None:
    """Set flagged, quarantined and every client's standing from the last round that each client took part in."""
    flagged: set[str] = set()
    quarantined: dict[str, str] = {}
    suspicious: dict[str, dict[str, Any]] = {}
    for entry in record.rounds:
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
                facts["evidence"] = entry["combined_evidence"].get(client, {})
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


def mean_over_collaborative(record: RunRecord, per_client: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Mean metrics over the collaborative clients: a contaminated client's own data says nothing of the adapter."""
    return mean_metrics(per_client[client] for client in collaborative(record) if client in per_client)


def add_metrics(
    record: RunRecord, kind: str, per_client: Mapping[str, Mapping[str, float]], when: str = "after"
) -> None:
    """Put clients' metrics of their "global" or "personalised" adapters into the record, and the means of them."""
    for client_id, metrics in per_client.items():
        record.clients[client_id]["metrics"]["before" if when == "before" else kind] = metrics
    record.metrics.setdefault(when, {})[kind] = mean_over_collaborative(record, per_client)
    if when == "after" and "before" in record.metrics:
        # Of the same clients as the means after: who collaborates was not known before the rounds.
        first = {client: facts["metrics"].get("before", {}) for client, facts in record.clients.items()}
        record.metrics["before"]["global"] = mean_over_collaborative(record, first)


def round_log(entry: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a round that trackers get."""
    losses = [loss for loss in entry["train_loss"].values() if loss is not None]
    logs = {"round": entry["round"], "flagged": len(entry["flagged"]), "quarantined": len(entry["quarantined"])}
    if losses:
        logs["loss"] = sum(losses) / len(losses)
    logs["seconds"] = sum(entry["seconds"].values())
    logs |= {f"eval_global_{name}": value for name, value in entry["metrics"].get("global", {}).items()}
    return logs


def round_line(entry: Mapping[str, Any], num_rounds: int) -> str:
    """A round in one line for the terminal."""
    logs = round_log(entry)
    parts = [f"round {entry['round']}/{num_rounds}: {len(entry['cohort'])} clients"]
    parts += [f"train loss {logs['loss']:.3f}"] if "loss" in logs else []
    parts += [f"{kind} {', '.join(sorted(entry[kind]))}" for kind in ("flagged", "quarantined") if entry[kind]]
    return ", ".join([*parts, f"{logs['seconds']:.1f} s"])


def component_changes(start: AdapterState, end: AdapterState) -> dict[str, float]:
    """How far the global adapter moved, {"A.direction", "A.magnitude", "B.direction", "B.magnitude"}: means over rows
    and modules of 1 - cos and of |change of the norm|. {} where the ranks differ (stacking)."""
    moved: dict[str, list[float]] = {}
    for module, after in end.items():
        before, after = start[module], after.rescaled(start[module].scale)
        if before.rank != after.rank:
            return {}
        for factor in ("A", "B"):
            turn, stretch = direction.component_change(getattr(before, factor), getattr(after, factor), "row")
            moved.setdefault(f"{factor}.direction", []).append(turn)
            moved.setdefault(f"{factor}.magnitude", []).append(stretch)
    return {part: sum(values) / len(values) for part, values in moved.items()}


def change(update: ClientUpdate, start: AdapterState | None, module: str) -> LoraFactors:
    """What a client changed in one module since the round's start."""
    return update.state[module] if start is None else update.state[module] - start[module]


def change_norm(update: ClientUpdate, start: AdapterState | None, modules: Iterable[str]) -> float:
    """Frobenius norm of a client's change, the modules together."""
    return sum(change(update, start, module).norm() ** 2 for module in modules) ** 0.5


def compared(
    updates: Sequence[ClientUpdate], start: AdapterState | None, modules: Iterable[str]
) -> tuple[dict[str, float], dict[str, Any]]:
    """({client: norm of its change}, cosines between the changes as the record has them: {} above MAX_SIMILARITY), the
    modules together."""
    ids = [u.client_id for u in updates]
    if not 1 < len(updates) <= MAX_SIMILARITY:
        return {u.client_id: change_norm(u, start, modules) for u in updates}, {}
    products = sum_of_products(updates, start, modules)
    norm = products.diagonal().clamp_min(0).sqrt()
    unit = norm.clamp_min(1e-150)
    cosine = products / (unit[:, None] * unit)
    rounded = [[round(v, 4) for v in row] for row in cosine.tolist()]
    return dict(zip(ids, norm.tolist(), strict=True)), {"ids": ids, "cosine": rounded}


def sum_of_products(
    updates: Sequence[ClientUpdate], start: AdapterState | None, modules: Iterable[str]
) -> torch.Tensor:
    """(K, K) inner products of the changes W_k - W_start, from those of the W themselves, which have half the rank."""
    total = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for module in modules:
        pairs = [u.state[module].pair() for u in updates]
        if start is None:
            total += lowrank.inner_products(pairs).cpu()
            continue
        G = lowrank.inner_products([*pairs, start[module].pair()]).cpu()
        total += G[:-1, :-1] - G[:-1, -1:] - G[-1:, :-1] + G[-1, -1]
    return total


def with_functional(
    evidence: dict[str, dict[str, dict[str, float | None]]], functional: Mapping[str, Evidence]
) -> dict[str, dict[str, dict[str, float | None]]]:
    """A round's evidence on the updates and, as one more kind, on what they do to others' losses."""
    found = _plain({client: {"functional": item} for client, item in functional.items()})
    return {client: {**kinds, **found.get(client, {})} for client, kinds in evidence.items()}


def past_rounds(record: RunRecord, before: int, functional: Mapping[str, Evidence] | None = None) -> list[PastRound]:
    """What the rounds before round `before` found, oldest first, as `aggregate` takes it; then this round's functional
    evidence, which is known before the updates are aggregated."""
    past = _past_rounds(record, before)
    if functional:
        flagged = past[-1].flagged if past else frozenset()
        past.append(PastRound({client: {"functional": item} for client, item in functional.items()}, flagged))
    return past


def _past_rounds(record: RunRecord, before: int) -> list[PastRound]:
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
        if entry["round"] < before and not entry.get("thinned")
    ]


def _plain(evidence: Mapping[str, Mapping[str, Evidence]]) -> dict[str, dict[str, dict[str, float | None]]]:
    return {
        client: {kind: {"score": item.score, "threshold": item.threshold} for kind, item in kinds.items()}
        for client, kinds in evidence.items()
    }
