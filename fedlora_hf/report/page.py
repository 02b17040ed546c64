"""The page: tables and words from the record, figures embedded, rendered with every value escaped."""
# SPDX-License-Identifier: Apache-2.0

import base64
import shlex
from collections.abc import Mapping
from functools import partial

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedlora_hf.record.stage_costs import stage_costs
from fedlora_hf.report import words
from fedlora_hf.report.figures import FIGURES
from fedlora_hf.report.module_figures import modules
from fedlora_hf.report.round_figures import round_metrics, stage_change
from fedlora_hf.report.view import (
    COLLABORATIVE,
    FLAGGED,
    LEFT_OUT,
    QUARANTINED,
    VIEWS,
    Client,
    Run,
    lower_is_better,
    mapping,
    mean,
    metric_order,
)

_AFTER = ("global", "personalised", "local")
_KINDS_OF_RUN = {"train": "Training run", "demo": "Demo run", "aggregate": "One-shot aggregation"}
_CLIENT_METRICS = 2  # metrics that fit into the table of clients beside its evidence


def render_page(run: Run, pictures: Mapping[str, tuple[bytes, bytes]]) -> str:
    """index.html. pictures: {figure name: (light PNG, dark PNG)}; a figure not in it is said to be missing."""
    environment = Environment(
        loader=PackageLoader("fedlora_hf.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        figure=words.figure_of, bytes=words.bytes_of, seconds=words.seconds_of, short=words.shortened
    )
    template = environment.get_template("index.html.jinja")
    sentences, numbers = words.diagnosis(run)
    embedded = {name: tuple(base64.b64encode(png).decode() for png in pair) for name, pair in pictures.items()}
    return template.render(
        record=run.record,
        model=run.record.model.get("name_or_path"),
        data=run.record.data.get("dataset"),
        run=run,
        kind=_KINDS_OF_RUN.get(run.record.kind, run.record.kind),
        title=str(run.record.method_info.get("title") or run.record.method),
        verdict=words.verdict(run),
        tiles=_tiles(run),
        flagged=[(client.title, words.reason_of(run, client)) for client in run.having(FLAGGED)],
        suspicious=[(client.title, words.suspicion_of(client)) for client in run.suspicious],
        unseen=words.unseen(run),
        influences=any(client.influence is not None for client in run.clients),
        quarantined=[(client.title, client.reason) for client in run.having(QUARANTINED)],
        sentences=sentences,
        numbers=numbers,
        figures=FIGURES,
        pictures=embedded,
        summary=_summary(run),
        clients=_clients_last_first(run),
        client_metrics=_client_metrics(run),
        stages=_stages(run),
        costs=stage_costs(run.record),
        modules=modules(run),
        mean=mean,
        total=lambda found: sum(found.values()) if found else None,
        origin=_origin(run),
        signs={COLLABORATIVE: "●", LEFT_OUT: "■", FLAGGED: "▲", QUARANTINED: "✕"},
        views=VIEWS,
        command=shlex.join(str(part) for part in run.record.command),
    )


def _tiles(run: Run) -> list[tuple[str, str]]:
    """The numbers at the top: [(value, what it is)]."""
    tiles = [
        (words.participation(run), "clients collaborate"),
        (str(len(run.having(FLAGGED))), "flagged"),
        (str(len(run.having(QUARANTINED))), "quarantined"),
        (str(len(run.rounds)), "round" if len(run.rounds) == 1 else "rounds"),
    ]
    for metric, before, after, _ in _summary(run)[:1]:
        for view in ("global", "personalised"):
            if after[view] is not None:
                start = "" if before is None else f", was {words.figure_of(before, 3)}"
                tiles.append((words.figure_of(after[view], 3), f"{view} {words.shortened(metric)}{start}"))
    return tiles


def _summary(run: Run) -> list[tuple[str, float | None, dict[str, float | None], str]]:
    """[(metric, before, {view: after}, which way is better)]: means over the collaborative clients."""
    after, before = mapping(run.record.metrics.get("after")), mapping(run.record.metrics.get("before"))
    names = metric_order(name for found in [*after.values(), *before.values()] for name in mapping(found))
    rows = []
    for name in names:
        row = {view: run.after(view, name) for view in _AFTER}
        start = run.before(name)
        if start is not None or any(value is not None for value in row.values()):
            rows.append((name, start, row, "lower" if lower_is_better(name) else "higher"))
    return rows


def _clients_last_first(run: Run) -> list[Client]:
    """The flagged and the unusable before the rest, who are many and unremarkable."""
    order = (FLAGGED, QUARANTINED, LEFT_OUT, COLLABORATIVE)
    return [client for state in order for client in run.having(state)]


def _client_metrics(run: Run) -> list[tuple[str, list[str]]]:
    """[(metric, the views that anybody has of it)] for the table of clients."""
    names = metric_order(name for client in run.clients for view in VIEWS for name in client.metrics.get(view, {}))
    return [
        (name, [view for view in VIEWS if any(name in client.metrics.get(view, {}) for client in run.clients)])
        for name in names[:_CLIENT_METRICS]
    ]


def _stages(run: Run) -> list[dict[str, object]]:
    """One row a stage: its rounds, size of updates, traffic, time, and [(metric, view, before, after)]."""
    metrics = round_metrics(run)[:3]
    rows: list[dict[str, object]] = []
    for place, (stage, entries) in enumerate(run.stages):
        change = partial(stage_change, run, place)
        changes = [(metric, view, *change(view, metric)) for metric in metrics for view in ("global", "personalised")]
        norms = [value for entry in entries for value in entry.update_norm.values()]
        rows.append(
            {
                "stage": stage or "training",
                "first": entries[0].number,
                "last": entries[-1].number,
                "norm": mean(norms),
                "bytes": _sum([entry.bytes_up for entry in entries]),
                "seconds": _sum([sum(entry.seconds.values()) for entry in entries if entry.seconds]),
                "changes": [item for item in changes if item[3] is not None],
            }
        )
    return rows


def _sum(found: list[float | None] | list[float]) -> float | None:
    known = [value for value in found if value is not None]
    return sum(known) if known else None


def _origin(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """What made the run, block by block: [(block, [(name, value)])]; empty blocks left out."""
    record = run.record
    method = {"name": record.method, **record.method_info}
    blocks = [
        ("Method", method),
        ("Options", record.options),
        ("Model", record.model),
        ("Adapter", record.adapter),
        ("Data", record.data),
        ("Versions", record.versions),
    ]
    return [
        (
            name,
            [(words.shortened(str(key).replace("_", " ")), words.plain_words(value)) for key, value in block.items()],
        )
        for name, block in blocks
        if block
    ]
