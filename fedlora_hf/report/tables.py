"""The tables of the page: every client, every round, every stage and every module in numbers."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from fedlora_hf.record.stage_costs import stage_costs
from fedlora_hf.report.module_figures import modules
from fedlora_hf.report.round_figures import round_metrics, stage_change, time_parts
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
from fedlora_hf.report.words import METRICS, bytes_of, figure_of, seconds_of, shortened
from fedlora_hf.util.stopwatch import PARTS

SIGNS = {COLLABORATIVE: "●", LEFT_OUT: "■", FLAGGED: "▲", QUARANTINED: "✕"}
_TONES = {COLLABORATIVE: "good", LEFT_OUT: ""}
_CLIENT_METRICS = 2  # metrics of a client that fit side by side
_AFTER = ("global", "personalised", "local")


class Cell(NamedTuple):
    """tone: "good", "bad" or none; it is never the only sign of what it says."""

    text: str
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """label: what it shows; of several columns, those in `words` hold text and the others numbers. The first column
    names the row. about: how to read it."""

    label: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: frozenset[int] = frozenset({0})
    about: str = ""

    @property
    def size(self) -> int:
        return len(self.rows)


def tables(run: Run) -> dict[str, list[Table]]:
    """{name of the figure beside which they stand: tables that have rows}."""
    found = {
        "evidence": [client_table(run)],
        "training": [round_table(run)],
        "clients": [metric_table(run)],
        "stages": [stage_table(run), cost_table(run)],
        "spectrum": [module_table(run)],
        "cost": [time_table(run)],
    }
    return {name: [table for table in group if table.rows] for name, group in found.items()}


def last_first(run: Run) -> list[Client]:
    """The flagged and the unusable before the rest, who are many and unremarkable."""
    return [client for state in (FLAGGED, QUARANTINED, LEFT_OUT, COLLABORATIVE) for client in run.having(state)]


def client_table(run: Run) -> Table:
    """State, weight, size and evidence of every client."""
    kept = any(client.influence is not None for client in run.clients)
    several = len({client.group for client in run.clients}) > 1
    rows = []
    for client in last_first(run):
        state = Cell(f"{SIGNS[client.state]} {client.state}", _TONES.get(client.state, "bad"))
        claimed = f" (claimed {figure_of(client.claimed_weight, 3)})" if client.outlier_claim else ""
        group = [Cell(shortened(client.group))] if several else []
        row = [Cell(client.title), state, *group, Cell(figure_of(client.weight, 3) + claimed)]
        if kept:
            row.append(Cell("–" if client.influence is None else f"{100 * client.influence:.0f} %"))
        row.append(Cell(figure_of(client.num_examples)))
        rows.append([*row, *(_score(client, kind) for kind in run.kinds)])
    influence = ("influence kept",) if kept else ()
    kinds = [f"{shortened(kind)} (threshold)" for kind in run.kinds]
    groups = ("group",) if several else ()
    columns = ["client", "state", *groups, "weight", *influence, "examples", *kinds]
    about = "Weight is a client's share of the global adapter. A score above its threshold, marked ▲, flags a client."
    about += " Each group has a global adapter of its own, and is judged by itself." if several else ""
    return Table("Every client in numbers", columns, rows, frozenset({0, 1}), about)


def _score(client: Client, kind: str) -> Cell:
    score = client.evidence.get(kind)
    if score is None:
        return Cell("–")
    sign = "▲ " if score.above else ""
    text = f"{sign}{figure_of(score.score, 3)} ({figure_of(score.threshold, 3)})"
    return Cell(text, "bad" if score.above else "")


def metric_table(run: Run) -> Table:
    """What every client's test data say of each adapter."""
    names = metric_order(name for client in run.clients for view in VIEWS for name in client.metrics.get(view, {}))
    shown = [
        (name, view)
        for name in names[:_CLIENT_METRICS]
        for view in VIEWS
        if any(name in client.metrics.get(view, {}) for client in run.clients)
    ]
    rows = [
        [
            Cell(f"{SIGNS[client.state]} {client.title}"),
            *(Cell(figure_of(client.metrics.get(view, {}).get(name))) for name, view in shown),
        ]
        for client in last_first(run)
        if client.metrics
    ]
    columns = ["client", *(f"{shortened(name)}, {view}" for name, view in shown)]
    return Table("Every client's metrics in numbers", columns, rows if shown else [])


def round_table(run: Run) -> Table:
    """One row a round."""
    rows = []
    for entry in run.rounds:
        iterations = figure_of(entry.n_iter) + ("" if entry.converged else ", not converged")
        cells = (
            str(entry.number),
            shortened(entry.stage or "–"),
            str(len(entry.cohort)),
            str(len(entry.flagged)),
            str(len(entry.quarantined)),
            figure_of(mean(entry.train_loss.values())),
        )
        traffic = (bytes_of(entry.bytes_up), bytes_of(entry.bytes_down))
        seconds = seconds_of(sum(entry.seconds.values()) if entry.seconds else None)
        steps = Cell(iterations, "" if entry.converged else "bad")
        rows.append([*map(Cell, cells), steps, *map(Cell, traffic), Cell(seconds)])
    columns = ["round", "stage", "clients", "flagged", "quarantined", "mean loss", "iterations", "up", "down", "time"]
    about = "Iterations are those of the aggregation; up and down are bytes that clients sent and were sent."
    return Table("Every round in numbers", columns, rows, frozenset({0, 1}), about)


def stage_table(run: Run) -> Table:
    """One row a stage: its rounds, size of updates, traffic, time, and what became of the mean metrics."""
    metrics = round_metrics(run)[:3]
    rows = []
    for place, (stage, entries) in enumerate(run.stages):
        change = partial(stage_change, run, place)
        found = [(metric, view, *change(view, metric)) for metric in metrics for view in ("global", "personalised")]
        said = [
            f"{view} {shortened(metric)} {'' if before is None else figure_of(before) + ' → '}{figure_of(after)}"
            for metric, view, before, after in found
            if after is not None
        ]
        first, last = entries[0].number, entries[-1].number
        cells = (
            shortened(stage or "training"),
            str(first) if first == last else f"{first}–{last}",
            figure_of(mean(value for entry in entries for value in entry.update_norm.values())),
            bytes_of(_sum([entry.bytes_up for entry in entries])),
            seconds_of(_sum([sum(entry.seconds.values()) for entry in entries if entry.seconds])),
            "\n".join(said) or "not recorded",
        )
        rows.append([Cell(text) for text in cells])
    columns = ["stage", "rounds", "mean update norm", "sent up", "time", "change of the mean"]
    several = rows if len(rows) > 1 else []
    return Table("Every stage in numbers", columns, several, frozenset({0, 5}))


def cost_table(run: Run) -> Table:
    """What a stage cost one client, and how far it moved the adapter; nothing where the run had one stage."""
    rows = []
    for row in stage_costs(run.record):
        moved = ", ".join(f"{shortened(part)} {figure_of(amount, 2)}" for part, amount in row.moved.items())
        cells = (
            shortened(row.stage),
            shortened(row.rounds),
            shortened(row.parts or "–"),
            bytes_of(row.up),
            bytes_of(row.down),
            bytes_of(row.stored),
            moved or "not recorded",
        )
        rows.append([Cell(text) for text in cells])
    about = (
        "What a stage cost one client, on average, and how far it moved the adapter: 1 − cos of the directions and "
        "change of the magnitudes, means over rows, modules, and rounds or clients."
    )
    columns = ["stage", "rounds", "trains", "sends", "is sent", "keeps", "moved"]
    several = rows if len(rows) > 1 else []
    return Table("What every stage cost", columns, several, frozenset({0, 2, 6}), about)


def time_table(run: Run) -> Table:
    """Wall time of all rounds by part, one row a part; nothing where it was not recorded by part."""
    timed = [entry for entry in run.rounds if entry.seconds]
    parts = [(part, sum(entry.seconds.get(part, 0.0) for entry in timed)) for part in time_parts(timed) if part]
    whole = sum(seconds for _, seconds in parts)
    if not whole > 0:
        return Table("Time by part", [], [])
    rows = [
        [Cell(shortened(part)), Cell(seconds_of(s)), Cell(f"{100 * s / whole:.0f} %"), Cell(PARTS.get(part, "–"))]
        for part, s in parts
    ]
    longest, most = max(parts, key=lambda item: item[1])
    about = f"Of {seconds_of(whole)} that the rounds took, {100 * most / whole:.0f} % went into {shortened(longest)}."
    return Table("Time by part", ["part", "time", "share", "what it is"], rows, frozenset({0, 3}), about)


def module_table(run: Run) -> Table:
    """One row an adapted module."""
    rows = []
    for module in modules(run):
        lost = "–" if module.discarded is None else f"{figure_of(100 * module.discarded, 3)} %"
        first = ", ".join(figure_of(value, 3) for value in module.spectrum[:6]) or "–"
        rows.append([Cell(module.name), Cell(figure_of(module.rank)), Cell(first), Cell(lost)])
    columns = ["module", "chosen rank", "spectrum, first values", "energy discarded"]
    return Table("Every module in numbers", columns, rows)


def mean_table(run: Run) -> Table:
    """Means over the collaborative clients, one row a metric."""
    after, before = mapping(run.record.metrics.get("after")), mapping(run.record.metrics.get("before"))
    names = metric_order(name for found in [*after.values(), *before.values()] for name in mapping(found))
    views = [view for view in _AFTER if any(run.after(view, name) is not None for name in names)]
    rows = []
    for name in names:
        found = [run.before(name), *(run.after(view, name) for view in views)]
        if any(value is not None for value in found):
            better = "lower" if lower_is_better(name) else "higher"
            meaning = METRICS.get(name, "")
            told = f"{shortened(name)}\n{meaning}" if meaning else shortened(name)
            rows.append([Cell(told), *(Cell(figure_of(value)) for value in found), Cell(better)])
    titles = {"global": "global adapter", "personalised": "personal adapter", "local": "training alone"}
    columns = ["metric", "before", *(titles[view] for view in views), "better is"]
    return Table("Means over the collaborative clients", columns, rows)


def _sum(found: Sequence[float | None]) -> float | None:
    known = [value for value in found if value is not None]
    return sum(known) if known else None
