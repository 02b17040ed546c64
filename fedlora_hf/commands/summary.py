"""The last thing a run prints: who was flagged and why, and what the federation brought."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedlora_hf.hub.tables import privacy_told
from fedlora_hf.methods.clair import FIRST
from fedlora_hf.numerics.evidence import Kind
from fedlora_hf.record.record import RunRecord
from fedlora_hf.report.view import Run, effect
from fedlora_hf.report.words import effect_of, judging, suspicion_of, unseen

MAX_CLIENTS, MAX_SUSPICIOUS = 40, 8


def print_summary(record: RunRecord, folder: str, console: Console | None = None) -> None:
    """A table of clients, the means before and after, and where everything is."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a file or a pipe has no width; 80 would break the rows
    console.print(_clients(record))
    claims = [(client, facts.get("outlier_claim")) for client, facts in sorted(record.clients.items())]
    for client, said in [item for item in claims if item[1]][:MAX_CLIENTS]:
        console.print(Text(f"warning: {client} {said}"), soft_wrap=True)
    for when, kind in (("before", "global"), ("after", "global"), ("after", "personalised")):
        means = record.metrics.get(when, {}).get(kind)
        if means:
            told = f" ({record.data['metrics']})" if record.data.get("metrics") else ""
            console.print(Text(f"{when}, {kind} adapter{told}: {_numbers(means)}"), soft_wrap=True)
    if said := record.method_info.get("global_adapter"):
        console.print(Text(f"the global adapter is {said}"), soft_wrap=True)
    verdict = record.diagnosis.get("summary")
    if verdict:
        console.print(Text(verdict), soft_wrap=True)
    if groups := record.diagnosis.get("groups"):
        console.print(Text(f"groups: {groups}"), soft_wrap=True)
    run = Run.of(record)
    if run.suspicious:
        named = "; ".join(f"{client.title}: {suspicion_of(client)}" for client in run.suspicious[:MAX_SUSPICIOUS])
        more = len(run.suspicious) - MAX_SUSPICIOUS
        console.print(Text(f"near the line: {named}{f'; and {more} more' if more > 0 else ''}"), soft_wrap=True)
    if said := judging(run):
        console.print(Text(said), soft_wrap=True)
    if said := unseen(run):
        console.print(Text(f"nobody was flagged: {said}"), soft_wrap=True)
    if privacy := privacy_told(record.privacy):
        console.print(Text(f"privacy: {privacy}"))
    console.print(Text(f"Adapters, run.json, README.md and report/index.html are in {folder}"), soft_wrap=True)


def _clients(record: RunRecord) -> Table:
    """A row a client; a column of losses only where there is one."""
    views = {"before": "before", "local": "alone", "global": "global", "personalised": "personal"}
    if record.kind == "aggregate":
        views |= {"before": "base", "local": "own"}
    had = [view for view in views if any(facts["metrics"].get(view) for facts in record.clients.values())]
    rounds = "one shot" if record.kind == "aggregate" else f"{len(record.rounds)} rounds"
    title = f"{record.method}: {rounds}, {len(record.clients)} clients"
    measured = "loss on the given data" if record.kind == "aggregate" else "loss on each one's test data"
    table = Table(title=title + (f"; {measured}" if had else ""))
    table.add_column("client")
    table.add_column("verdict")
    table.add_column("weight", justify="right")
    for view in had:
        table.add_column(views[view], justify="right")
    # Those that were left out first: they are what one looks for.
    order = sorted(record.clients, key=lambda client: (record.clients[client]["collaborative"], client))
    for client in order[:MAX_CLIENTS]:
        facts = record.clients[client]
        losses = (_loss(facts["metrics"].get(view)) for view in had)
        table.add_row(Text(client), Text(_verdict(record, client)), _weight(facts), *losses)
    if len(order) > MAX_CLIENTS:
        table.caption = f"and {len(order) - MAX_CLIENTS} more, in run.json"
    return table


def _verdict(record: RunRecord, client: str) -> str:
    if client in record.quarantined:
        return f"quarantined: {record.quarantined[client]}"
    if client not in record.flagged:
        kept, group = record.clients[client].get("influence"), record.clients[client].get("group", FIRST)
        told = "collaborative" if group == FIRST else f"collaborative, group {group}"
        return told if kept is None or kept >= 0.995 else f"{told}, kept {100 * kept:.0f} %"
    usable = {
        kind: item
        for kind, item in record.clients[client]["evidence"].items()
        if item["threshold"] and item["score"] is not None
    }
    if not usable:
        return "flagged"
    kind = max(usable, key=lambda name: usable[name]["score"] / usable[name]["threshold"])
    score, threshold = usable[kind]["score"], usable[kind]["threshold"]
    told = f"flagged: {kind} {score:.2f}" + (f" > {threshold:.2f}" if score > threshold else ", flagged before")
    return told if kind != Kind.FUNCTIONAL else f"{told}; {effect_of(effect(record.clients[client].get('effect')))}"


def _weight(facts: Mapping[str, Any]) -> str:
    """The weight a client has, and the one it claimed where that is out of all proportion."""
    claimed = facts.get("claimed_weight") if facts.get("outlier_claim") else None
    return f"{facts['weight']:.3f}" + ("" if claimed is None else f" (claimed {claimed:.3f})")


def _loss(metrics: Mapping[str, Any] | None) -> str:
    return f"{metrics['loss']:.3f}" if metrics and metrics.get("loss") is not None else "-"


def _numbers(means: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in means.items() if isinstance(value, float))
