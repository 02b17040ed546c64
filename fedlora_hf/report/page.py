"""The page: first what anybody wants to know, then figures and tables, rendered with every value escaped."""
# SPDX-License-Identifier: Apache-2.0

import base64
import shlex
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedlora_hf.record.answers import Answered
from fedlora_hf.report import words
from fedlora_hf.report.diagnosis import diagnosis
from fedlora_hf.report.figures import FIGURES, ReportFigure
from fedlora_hf.report.gains import gains
from fedlora_hf.report.tables import SIGNS, mean_table, tables
from fedlora_hf.report.view import FLAGGED, QUARANTINED, STATES, Run

_LONGEST_TEXT = 1200  # of a question or an answer, in letters
_KINDS_OF_RUN = {"train": "Training run", "demo": "Demo run", "aggregate": "One-shot aggregation"}


class Picture(NamedTuple):
    """One figure as PNG: for wide and for narrow windows, each on a light and on a dark page."""

    light: bytes
    dark: bytes
    narrow_light: bytes
    narrow_dark: bytes


class Charge(NamedTuple):
    """A client and one sentence about it."""

    client: str
    reason: str


def render_page(run: Run, pictures: Mapping[str, Picture], answers: Sequence[Answered] = ()) -> str:
    """index.html. pictures: {figure name: its four PNG}; a figure not in it is named at the end of the page. answers:
    stand between two marks, by which `hub.plan` takes them out of what it sends."""
    environment = Environment(
        loader=PackageLoader("fedlora_hf.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(short=words.shortened, long=lambda text: words.shortened(text, _LONGEST_TEXT))
    sentences, findings = diagnosis(run)
    beside = tables(run)
    shown = [figure for figure in FIGURES if figure.name in pictures or beside.get(figure.name)]
    return environment.get_template("index.html.jinja").render(
        record=run.record,
        model=run.record.model.get("name_or_path"),
        data=run.record.data.get("dataset"),
        kind=_KINDS_OF_RUN.get(run.record.kind, run.record.kind),
        title=str(run.record.method_info.get("title") or run.record.method),
        verdict=words.verdict(run),
        tiles=_tiles(run),
        members=[(state, SIGNS[state], [c.title for c in run.having(state)]) for state in STATES if run.having(state)],
        flagged=[Charge(client.title, f"{words.reason_of(run, client)}.") for client in run.having(FLAGGED)],
        quarantined=[Charge(client.title, client.reason) for client in run.having(QUARANTINED)],
        suspicious=[Charge(client.title, f"{words.suspicion_of(client)}.") for client in run.suspicious],
        claims=[Charge(client.title, client.outlier_claim) for client in run.clients if client.outlier_claim],
        unseen=words.unseen(run),
        judging=words.judging(run),
        rehearsal=words.rehearsal(run),
        answers=[(answer.client, answer.question, _said(answer)) for answer in answers],
        gains=gains(run),
        means=mean_table(run),
        sentences=sentences,
        findings=findings,
        sections=[(figure, beside.get(figure.name, [])) for figure in shown],
        missing=_missing(pictures),
        pictures={name: [base64.b64encode(png).decode() for png in four] for name, four in pictures.items()},
        origin=_origin(run),
        command=shlex.join(str(part) for part in run.record.command),
    )


def _said(answer: Answered) -> list[tuple[str, str]]:
    """[(whose answer, its text)]; one that a client has not is left out."""
    given = [
        ("expected", " / ".join(answer.expected)),
        ("before", answer.before or "(nothing)"),
        ("global adapter", answer.shared or "(nothing)"),
        ("personal adapter", answer.own),
    ]
    return [(whose, text) for whose, text in given if text]


def _missing(pictures: Mapping[str, Picture]) -> list[ReportFigure]:
    return [figure for figure in FIGURES if figure.name not in pictures]


def _tiles(run: Run) -> list[tuple[str, str]]:
    """The numbers at the top: [(value, what it is)]."""
    tiles = [
        (words.participation(run), "clients collaborate"),
        (f"{len(run.having(FLAGGED)):,}", "flagged"),
        (f"{len(run.suspicious):,}", "close to the line"),
        (f"{len(run.having(QUARANTINED)):,}", "quarantined"),
        (f"{len(run.rounds):,}", "round" if len(run.rounds) == 1 else "rounds"),
    ]
    if not run.clients:
        tiles = tiles[-1:]
    tiles = [tile for tile in tiles if tile[0] != "0" or tile[1] == "flagged"]
    for metric in run.metrics_after("global")[:1]:
        before = run.before(metric)
        start = "" if before is None else f", was {words.figure_of(before, 3)}"
        for view, name in (("global", "global"), ("personalised", "personal")):
            if (after := run.after(view, metric)) is not None:
                tiles.append((words.figure_of(after, 3), f"{name} {words.shortened(metric)}{start}"))
    return tiles


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
