"""Figures along the rounds: loss, size of the updates and metrics; what each stage changed; bytes and seconds."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Iterable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedlora_hf.report.style import (
    SERIES_MARKERS,
    VIEW_MARKERS,
    Theme,
    entitle,
    height_of,
    label,
    legend_above,
    new_figure,
    panels_in,
    plain_numbers,
)
from fedlora_hf.report.view import COHORT, FLAGGED, VIEWS, Round, Run, Values, lower_is_better, metric_order
from fedlora_hf.report.words import byte_unit
from fedlora_hf.util.stopwatch import PARTS

_MAX_METRICS = 4


def training(run: Run, theme: Theme) -> Figure | None:
    """Training loss and update norm of every client, and the metrics of the global and the personalised adapters."""
    panels: list[Callable[[Axes], None]] = []
    if any(entry.train_loss for entry in run.rounds):
        panels.append(lambda axes: _client_lines(axes, run, theme, "training loss", lambda entry: entry.train_loss))
    if any(entry.update_norm for entry in run.rounds):
        panels.append(
            lambda axes: _client_lines(axes, run, theme, "size of the update", lambda entry: entry.update_norm)
        )
    for metric in round_metrics(run)[:_MAX_METRICS]:
        panels.append(lambda axes, metric=metric: _metric_lines(axes, run, theme, metric))  # type: ignore[misc]
    if not panels:
        return None
    figure = new_figure(theme, 0.3 + height_of(theme, len(panels), 2, 2.5))
    for axes, panel in zip(panels_in(figure, theme, len(panels), 2), panels, strict=True):
        panel(axes)
        _dress_rounds(axes, run, theme)
    legend_above(figure, theme)
    return figure


def round_metrics(run: Run) -> list[str]:
    return metric_order(name for entry in run.rounds for found in entry.metrics.values() for name in found)


def _client_lines(axes: Axes, run: Run, theme: Theme, title: str, pick: Callable[[Round], Values]) -> None:
    """One thin line a client (flagged ones dashed, with triangles) and the median of the others, thick."""
    entitle(axes, title, theme)
    flagged = {client.id for client in run.having(FLAGGED)}
    ids = sorted({client for entry in run.rounds for client in pick(entry)} - {COHORT}, key=lambda i: i in flagged)
    few = len(ids) <= 40
    seen: set[bool] = set()
    for client in ids:
        bad = client in flagged
        points = [(entry.number, pick(entry)[client]) for entry in run.rounds if client in pick(entry)]
        name = ("flagged, each" if bad else "collaborative, each") if bad not in seen else None
        seen.add(bad)
        axes.plot(
            *zip(*points, strict=True),
            color=theme.bad if bad else theme.good,
            ls="--" if bad else "-",
            marker="^" if bad else "o",
            ms=3.5 if few else 2,
            lw=0.9,
            alpha=0.75 if few else 0.3,
            label=name,
        )
    centre = [(e.number, _median([v for c, v in pick(e).items() if c not in flagged])) for e in run.rounds if pick(e)]
    known = [(n, value) for n, value in centre if value is not None]
    if known:
        name = "median of the not flagged" if ids else "cohort"
        axes.plot(*zip(*known, strict=True), color=theme.ink, lw=2, marker="s", ms=4, label=name)
    spread = [value for entry in run.rounds for value in pick(entry).values()]
    if min(spread) > 0 and max(spread) > 30 * min(spread):
        axes.set_yscale("log")
        plain_numbers(axes)


def _median(found: list[float]) -> float | None:
    ordered = sorted(found)
    half = len(ordered) // 2
    return None if not ordered else ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _metric_lines(axes: Axes, run: Run, theme: Theme, metric: str) -> None:
    """Mean over the not flagged clients, with the range of the middle 80 % of them where they were recorded."""
    better = "lower" if lower_is_better(metric) else "higher"
    entitle(axes, f"{label(metric, 30)} ({better} is better)", theme)
    flagged = {client.id for client in run.having(FLAGGED)}
    for view in [*VIEWS, *sorted({view for entry in run.rounds for view in entry.metrics} - set(VIEWS))]:
        points = [(e, run.mean_metric(e, view, metric)) for e in run.rounds]
        known = [(entry, value) for entry, value in points if value is not None]
        if not known:
            continue
        x = [entry.number for entry, _ in known]
        marker, means = VIEW_MARKERS.get(view, "P"), [value for _, value in known]
        axes.plot(x, means, label=f"{label(view)}, mean", color=theme.view(view), marker=marker, ms=5, lw=1.8)
        each = [[v for c, v in e.metrics[view][metric].items() if c not in flagged] for e, _ in known]
        if max(map(len, each)) > 2:
            low, high = [_quantile(found, 0.1) for found in each], [_quantile(found, 0.9) for found in each]
            axes.fill_between(x, low, high, color=theme.view(view), alpha=0.15, lw=0)
            if len(x) == 1:
                axes.vlines(x, low, high, color=theme.view(view), alpha=0.4, lw=4)


def _quantile(found: list[float], share: float) -> float:
    ordered = sorted(found)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _dress_rounds(axes: Axes, run: Run, theme: Theme) -> None:
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    numbers = [entry.number for entry in run.rounds]
    axes.set_xlim(min(numbers) - 0.5, max(numbers) + 0.5)
    stages = run.stages
    if len(stages) < 2 or len(stages) > 12:
        return
    low, high = axes.get_ylim()
    if axes.get_yscale() == "linear":
        axes.set_ylim(low, high + 0.09 * (high - low))
    for place, (stage, entries) in enumerate(stages):
        start, end = entries[0].number - 0.5, entries[-1].number + 0.5
        if place % 2:
            axes.axvspan(start, end, color=theme.grid, alpha=0.45, lw=0, zorder=0)
        where = axes.get_xaxis_transform()
        axes.text(
            (start + end) / 2,
            0.985,
            label(stage, 14),
            transform=where,
            ha="center",
            va="top",
            fontsize=7.5,
            color=theme.muted,
        )


def stages(run: Run, theme: Theme) -> Figure | None:
    """Each stage as an arrow, from the mean metric before it to the one after it."""
    metrics = round_metrics(run)[:3]
    if len(run.stages) < 2 or not metrics:
        return None
    figure = new_figure(theme, 0.4 + height_of(theme, len(metrics), 3, 2.5))
    for axes, metric in zip(panels_in(figure, theme, len(metrics), 3), metrics, strict=True):
        better = "lower" if lower_is_better(metric) else "higher"
        entitle(axes, f"{label(metric, 20)} ({better} is better)", theme)
        for offset, view in ((-0.14, "global"), (0.14, "personalised")):
            _arrows(axes, run, theme, metric, view, offset)
        names = [label(stage or "training", 14) for stage, _ in run.stages]
        crowded = len(names) * (3 if theme.narrow else len(metrics)) > 9
        axes.set_xticks(range(len(names)), names, rotation=30 if crowded else 0)
        axes.set_xlim(-0.6, len(names) - 0.4)
    legend_above(figure, theme)
    return figure


def stage_change(run: Run, place: int, view: str, metric: str) -> tuple[float | None, float | None]:
    """(mean metric before stage `place`, after it); before the first stage stands the unadapted model."""
    after = _last([run.mean_metric(entry, view, metric) for entry in run.stages[place][1]])
    earlier = [entry for _, entries in run.stages[:place] for entry in entries]
    before = _last([run.mean_metric(entry, view, metric) for entry in earlier])
    return (run.before(metric) if before is None else before), after


def _last(found: list[float | None]) -> float | None:
    known = [value for value in found if value is not None]
    return known[-1] if known else None


def _arrows(axes: Axes, run: Run, theme: Theme, metric: str, view: str, offset: float) -> None:
    colour = theme.view(view)
    for place in range(len(run.stages)):
        before, after = stage_change(run, place, view, metric)
        if after is None:
            continue
        x = place + offset
        if before is not None and before != after:
            style = {"arrowstyle": "-|>", "color": colour, "lw": 1.6, "shrinkB": 4}
            axes.annotate("", (x, after), (x, before), arrowprops=style)
            axes.plot([x - 0.08, x + 0.08], [before, before], color=colour, lw=1.4)
        axes.scatter([x], [after], s=28, color=colour, marker=VIEW_MARKERS[view], label=f"{view}, mean", zorder=3)


def cost(run: Run, theme: Theme) -> Figure | None:
    """Bytes each way and seconds, round by round."""
    byte_rows = [(e.number, e.bytes_up or 0.0, e.bytes_down or 0.0) for e in run.rounds if e.bytes_up or e.bytes_down]
    timed = [entry for entry in run.rounds if entry.seconds]
    if not byte_rows and not timed:
        return None
    count = int(bool(byte_rows)) + int(bool(timed))
    figure = new_figure(theme, height_of(theme, count, 2, 2.9))
    panels = panels_in(figure, theme, count, 2)
    if byte_rows:
        axes = panels[0]
        numbers = [row[0] for row in byte_rows]
        divisor, unit = byte_unit(max(max(row[1:]) for row in byte_rows))
        up, down = ([row[k] / divisor for row in byte_rows] for k in (1, 2))
        axes.bar([n - 0.2 for n in numbers], up, 0.38, color=theme.good, label="clients to server")
        axes.bar([n + 0.2 for n in numbers], down, 0.38, color=theme.series[3], hatch="////", label="server to clients")
        entitle(axes, f"traffic, {unit}", theme)
        _dress_cost(axes, run, theme)
    if timed:
        _seconds_bars(panels[-1], timed, theme)
        _dress_cost(panels[-1], run, theme)
    return figure


def _dress_cost(axes: Axes, run: Run, theme: Theme) -> None:
    _dress_rounds(axes, run, theme)
    axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="upper left", ncols=2 if theme.narrow else 3, bbox_to_anchor=(-0.02, -0.26), borderaxespad=0)


def time_parts(timed: Iterable[Round]) -> list[str]:
    """The parts that rounds' seconds were recorded of: ours in the order in which they come, then others by name."""
    found = {part for entry in timed for part in entry.seconds}
    return [part for part in PARTS if part in found] + sorted(found - set(PARTS))


def _seconds_bars(axes: Axes, timed: list[Round], theme: Theme) -> None:
    """One bar a round, its named parts stacked where they were recorded."""
    parts = time_parts(timed)
    if len(parts) > len(SERIES_MARKERS):
        parts = []
    bottoms = [0.0] * len(timed)
    numbers = [entry.number for entry in timed]
    hatches = ("", "////", "....", "\\\\\\\\", "xxxx", "----", "||||", "++++")
    for place, part in enumerate(parts):
        heights = [entry.seconds.get(part, 0.0) for entry in timed]
        name = label(part) if part != COHORT else None
        axes.bar(numbers, heights, 0.6, bottom=bottoms, color=theme.series[place], hatch=hatches[place], label=name)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    if not parts:
        axes.bar(numbers, [sum(entry.seconds.values()) for entry in timed], 0.6, color=theme.good)
    entitle(axes, "seconds", theme)
