"""Figures with the clients side by side: the evidence against each, their similarity, what each gained."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from fedlora_hf.report.columns import Columns
from fedlora_hf.report.style import (
    MARKERS,
    VIEW_MARKERS,
    Theme,
    entitle,
    label,
    legend_above,
    new_figure,
    plain_numbers,
)
from fedlora_hf.report.view import (
    FLAGGED,
    QUARANTINED,
    STATES,
    VIEWS,
    Client,
    Run,
    lower_is_better,
    metric_order,
    natural,
    number,
    sequence,
)
from fedlora_hf.report.words import KIND_TITLES

_FAR = 8  # a score beyond this multiple of its threshold turns the axis logarithmic above the threshold


def evidence(run: Run, theme: Theme) -> Figure | None:
    """Score of every client, one panel a kind, with the threshold that flags."""
    judged = [client for client in run.clients if client.evidence]
    if not judged:
        return None
    columns, kinds = Columns.of(judged, theme.width), run.kinds
    figure = new_figure(theme, 0.5 + 1.7 * len(kinds) + columns.footing)
    for row, kind in enumerate(kinds):
        axes = figure.add_subplot(len(kinds), 1, row + 1)
        _evidence_panel(axes, columns, kind, theme)
        columns.dress(axes, theme, last=row == len(kinds) - 1)
    legend_above(figure, theme)
    return figure


def _evidence_panel(axes: Axes, columns: Columns, kind: str, theme: Theme) -> None:
    thresholds = {client.evidence[kind].threshold for client in columns.clients if kind in client.evidence}
    drawn = sorted(value for value in thresholds if value is not None)
    for state in STATES:
        group = [(x, client.evidence[kind]) for x, client in columns.of_state(state) if kind in client.evidence]
        group_name = f"{state} ({len(columns.of_state(state))})"
        for above in (False, True):
            chosen = [(x, item.score) for x, item in group if item.above is above]
            face = theme.state(state) if above or state != FLAGGED else theme.surface
            axes.scatter(
                [x for x, _ in chosen],
                [score for _, score in chosen],
                s=26 if len(columns.clients) <= 60 else 14,
                marker=MARKERS.get(state, "s"),
                facecolor=face,
                edgecolor=theme.state(state),
                linewidth=1.1,
                zorder=3,
                label=group_name if group and (above == (state == FLAGGED)) else None,
            )
    title = KIND_TITLES.get(kind, label(kind, 60))
    entitle(axes, title if drawn else f"{title} (no threshold: not used to flag here)", theme)
    axes.set_ylabel("score")
    axes.margins(y=0.12)
    if len(drawn) == 1:
        axes.axhline(drawn[0], color=theme.bad, lw=1.1, ls="--", label="threshold")
    elif drawn:
        pairs = [
            (x, c.evidence[kind].threshold)
            for x, c in zip(columns.places, columns.clients, strict=True)
            if kind in c.evidence
        ]
        known = [(x, value) for x, value in pairs if value is not None]
        axes.scatter(
            [x for x, _ in known],
            [v for _, v in known],
            marker="_",
            s=60 if len(known) <= 60 else 12,
            color=theme.bad,
            label="threshold",
        )
    _stretch(axes, [client.evidence[kind].score for client in columns.clients if kind in client.evidence], drawn)


def _stretch(axes: Axes, scores: Sequence[float], thresholds: Sequence[float]) -> None:
    """A boosted update may score a hundred times the threshold; the honest ones must stay visible beside it."""
    edge = max(map(abs, thresholds), default=0.0)
    if edge and max(map(abs, scores), default=0.0) > _FAR * edge:
        axes.set_yscale("symlog", linthresh=2 * edge)
        axes.set_ylim(min(*scores, 0.0) * 2 - edge / 2, max(*scores, edge) * 3)
        plain_numbers(axes)


def similarity(run: Run, theme: Theme) -> Figure | None:
    """Cosine between the updates of every two clients, flagged clients last."""
    ids = [str(item) for item in sequence(run.record.similarity.get("ids"))]
    rows = [[number(cell) for cell in sequence(row)] for row in sequence(run.record.similarity.get("cosine"))]
    if len(ids) < 2 or len(rows) != len(ids) or any(len(row) != len(ids) for row in rows):
        return None
    flagged = {client.id for client in run.having(FLAGGED)}
    order = sorted(range(len(ids)), key=lambda i: (ids[i] in flagged, natural(ids[i])))
    grid = [[float("nan") if i == j else _or_nan(rows[i][j]) for j in order] for i in order]
    limit = max((abs(cell) for row in grid for cell in row if cell == cell), default=0.0) or 1.0
    figure = new_figure(theme, 4.4 if theme.narrow else 6.6, 7.4)
    axes = figure.add_subplot()
    colours = LinearSegmentedColormap.from_list("cosine", [theme.bad, theme.surface, theme.good]).with_extremes(
        bad=theme.grid
    )
    image = axes.imshow(grid, cmap=colours, vmin=-limit, vmax=limit, interpolation="nearest")
    place = "bottom" if theme.narrow else "right"
    bar = figure.colorbar(image, ax=axes, shrink=0.7, pad=0.02, location=place)
    same = "1: the same" if theme.narrow else "1: the same direction"
    bar.set_label(f"cosine ({same}, 0: unrelated, -1: opposite)")
    bar.outline.set_visible(False)
    _dress_grid(axes, [ids[i] for i in order], flagged, theme)
    if len(ids) <= (0 if theme.narrow else 14):
        for i, row in enumerate(grid):
            for j, cell in enumerate(row):
                if cell == cell:
                    strong = abs(cell) > 0.6 * limit
                    colour = theme.surface if strong else theme.ink
                    axes.text(j, i, f"{round(cell, 2) + 0.0:.2f}", ha="center", va="center", fontsize=7.5, color=colour)
    return figure


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _dress_grid(axes: Axes, ids: list[str], flagged: set[str], theme: Theme) -> None:
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    honest = sum(client_id not in flagged for client_id in ids)
    if 0 < honest < len(ids):
        axes.axhline(honest - 0.5, color=theme.ink, lw=1)
        axes.axvline(honest - 0.5, color=theme.ink, lw=1)
    if len(ids) <= (20 if theme.narrow else 40):
        names = [label(client_id, 18) for client_id in ids]
        axes.set_xticks(range(len(ids)), names, rotation=90, fontsize=8)
        axes.set_yticks(range(len(ids)), names, fontsize=8)
        for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
            for tick, client_id in zip(ticks, ids, strict=True):
                tick.set_color(theme.bad if client_id in flagged else theme.ink)
        return
    groups = [("collaborative", 0, honest), ("flagged", honest, len(ids))]
    shown = [(name, (start + end - 1) / 2, end - start) for name, start, end in groups if end > start]
    axes.set_xticks([middle for _, middle, _ in shown], [f"{name} ({size})" for name, _, size in shown])
    axes.set_yticks([middle for _, middle, _ in shown], [name for name, _, _ in shown], rotation=90, va="center")


def gains(run: Run, theme: Theme) -> Figure | None:
    """Every client's metrics at the end: before, global adapter, personalised adapter, local training alone."""
    clients = [c for c in run.clients if c.state != QUARANTINED and any(c.metrics.get(view) for view in VIEWS)]
    metrics = metric_order(name for c in clients for view in VIEWS for name in c.metrics.get(view, {}))[:3]
    if not metrics:
        return None
    columns = Columns.of(clients, theme.width)
    figure = new_figure(theme, 0.5 + 2.1 * len(metrics) + columns.footing)
    for row, metric in enumerate(metrics):
        axes = figure.add_subplot(len(metrics), 1, row + 1)
        better = "lower" if lower_is_better(metric) else "higher"
        entitle(axes, f"{label(metric, 40)} ({better} is better)", theme)
        _gain_panel(axes, columns, metric, theme)
        columns.dress(axes, theme, last=row == len(metrics) - 1)
    legend_above(figure, theme)
    return figure


def _gain_panel(axes: Axes, columns: Columns, metric: str, theme: Theme) -> None:
    for place, client in zip(columns.places, columns.clients, strict=True):
        found = _of_metric(client, metric)
        if len(found) > 1:
            axes.plot([place, place], [min(found), max(found)], color=theme.grid, lw=1.2, zorder=1)
    size = 26 if len(columns.clients) <= 60 else 10
    axes.margins(y=0.1)
    for view in VIEWS:
        pairs = [
            (x, client.metrics[view][metric])
            for x, client in zip(columns.places, columns.clients, strict=True)
            if metric in client.metrics.get(view, {})
        ]
        if pairs:
            x, y = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            axes.scatter(x, y, s=size, marker=VIEW_MARKERS[view], color=theme.view(view), label=view, zorder=3, lw=0)


def _of_metric(client: Client, metric: str) -> list[float]:
    return [client.metrics[view][metric] for view in VIEWS if metric in client.metrics.get(view, {})]
