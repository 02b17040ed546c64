"""What goes into the run record: its opening, an entry for each round, metrics."""
# SPDX-License-Identifier: Apache-2.0

import datetime
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora_hf import privacy
from fedlora_hf.config import may_change
from fedlora_hf.errors import ConfigError
from fedlora_hf.methods.method import SAID, Method
from fedlora_hf.numerics.evidence import Evidence
from fedlora_hf.record.changes import compared, component_changes
from fedlora_hf.record.evidence import plain_evidence
from fedlora_hf.record.groups import plain_groups
from fedlora_hf.record.record import RunRecord, plain, versions
from fedlora_hf.record.standing import collaborative, update_standing
from fedlora_hf.record.thinning import thin, thinned_modules
from fedlora_hf.training.metrics import mean_metrics
from fedlora_hf.training.stages import StageName
from fedlora_hf.update import AdapterState, Aggregate, ClientUpdate
from fedlora_hf.util.redaction import redacted
from fedlora_hf.util.rehearsal import Contamination


def opening(
    args: Any,
    method: Method,
    facts: Mapping[str, Any],
    num_examples: Mapping[str, int | None],
    adapter: Mapping[str, Any],
    sha256: Mapping[str, str] | None = None,
) -> RunRecord:
    """The record of a run that is about to begin. `facts`: what only the caller knows; its keys are record fields.
    sha256: of the data and of the base model, where they are here."""
    record = RunRecord(
        kind="train",
        method=method.name,
        seed=args.seed,
        method_info={
            "title": method.title,
            "paper": method.paper,
            "averages": method.averages,
            "counts": SAID[method.counts],
        },
        options=plain(args.changed()),
        command=redacted([Path(sys.argv[0]).name.replace("__main__.py", "fedlora"), *sys.argv[1:]]),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=versions(),
        adapter=dict(adapter),
        sha256=dict(sha256 or {}),
        clients={client: newcomer(count, args.contaminated.get(client)) for client, count in num_examples.items()},
    )
    for name, value in facts.items():
        setattr(record, name, value)
    return record


def newcomer(num_examples: int | None, contamination: Contamination | None = None) -> dict[str, Any]:
    """What is known of a client that has sent nothing yet; "contaminated" says how it is so on purpose, if it is."""
    known: dict[str, Any] = {
        "collaborative": True,
        "weight": 0.0,
        "num_examples": num_examples,
        "evidence": {},
        "metrics": {},
    }
    return known if contamination is None else {**known, "contaminated": str(contamination)}


def check_same_run(earlier: RunRecord, now: RunRecord) -> None:
    """Refuse to go on from a run with other data, clients, seed or options: its rounds would not be this run's."""
    for name in sorted(set(earlier.options) | set(now.options)):
        if not may_change(name) and earlier.options.get(name) != now.options.get(name):
            raise ConfigError(
                f"{name}={now.options.get(name)!r}: the run to resume has {earlier.options.get(name)!r}; pass the same"
            )
    for what, old, new in (
        ("seed", earlier.seed, now.seed),
        ("clients", sorted(earlier.clients), sorted(now.clients)),
    ):
        if old != new:
            raise ConfigError(f"{what}: {str(new)[:80]}; the run to resume has {str(old)[:80]}; pass the same")
    for what, told in (("data", "the clients' examples"), ("base", "the base model's weights")):
        then, here = (str(record.sha256.get(what) or "") for record in (earlier, now))
        if then and here and then != here:
            raise ConfigError(
                f"{what}: {told} are not those of the run to resume (sha256 {here[:12]}, then {then[:12]}); restore "
                "them, or begin a new run in another --output_dir"
            )


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
    stage: StageName = StageName.FEDERATED,
    message_bytes: int | None = None,
    functional: Mapping[str, Evidence] | None = None,
    effects: Mapping[str, Mapping[str, float]] | None = None,
    judging: Mapping[str, Any] | None = None,
    starts: Mapping[str, AdapterState] | None = None,
) -> None:
    """Append what a round did, and bring the verdict on every client up to date.

    start: the adapter the round began with, None if there was none. message_bytes: what a client sends and is sent;
    default all it sent. functional, effects, judging: what others' losses said; starts: {client: its own start}.
    """
    norms, cosines = compared(updates, start, combined.state, starts)
    record.rounds.append(
        {
            "round": number,
            "stage": str(stage),
            "cohort": list(cohort),
            "collaborative": [u.client_id for u in updates if u.client_id not in combined.flagged],
            "flagged": list(combined.flagged),
            "quarantined": dict(quarantined),
            "weights": dict(combined.weights),
            "influence": dict(combined.influence),
            "suspicious": {c: {"kind": kind, "of_line": share} for c, (kind, share) in combined.suspicious.items()},
            "claimed_weights": dict(combined.claimed_weights),
            "outlier_claims": dict(combined.outlier_claims),
            "train_loss": {u.client_id: u.metrics["train_loss"] for u in updates if "train_loss" in u.metrics},
            "update_norm": norms,
            "evidence": plain_evidence(combined.this_round or combined.evidence, functional),
            "combined_evidence": plain_evidence(combined.evidence),
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
        | ({"effects": plain(effects), "judging": plain(judging or {})} if effects else {})
        | ({"groups": plain_groups(combined.groups)} if combined.groups else {})
    )
    record.modules = plain(thinned_modules(combined.modules, len(updates)))
    record.diagnosis = plain(combined.diagnosis)
    record.similarity = cosines
    record.privacy = privacy.account(record.options, record.rounds)
    update_standing(record)
    thin(record.rounds)


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
