"""The figure of the adapted modules: their spectra with the chosen rank, and the energy each lost."""
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedlora_hf.report.style import (
    SERIES_MARKERS,
    Theme,
    entitle,
    height_of,
    label,
    legend_above,
    new_figure,
    panels_in,
    plain_numbers,
)
from fedlora_hf.report.view import Run, natural, number, sequence

_FLOOR = 1e-8  # relative spectrum below this is rounding
_SHOWN = 32  # places of a spectrum worth drawing, or twice the rank where that is more


@dataclass(frozen=True)
class Module:
    """One adapted module; `family` is the last part of its name (q_proj, v_proj), which is shared by all layers."""

    name: str
    family: str
    rank: int | None
    spectrum: list[float]
    discarded: float | None


def modules(run: Run) -> list[Module]:
    """The record's modules in natural order (layer 2 before layer 10)."""
    found = []
    for name in sorted(run.record.modules, key=natural):
        entry = run.record.modules[name]
        rank, spectrum = number(entry.get("rank")), [number(value) for value in sequence(entry.get("spectrum"))]
        found.append(
            Module(
                name=name,
                family=name.rsplit(".", 1)[-1],
                rank=None if rank is None else int(rank),
                spectrum=[value for value in spectrum if value is not None],
                discarded=number(entry.get("discarded_energy")),
            )
        )
    return found


def spectrum(run: Run, theme: Theme) -> Figure | None:
    """Left: each module's spectrum relative to its largest value, chosen rank ringed. Right: discarded energy."""
    found = modules(run)
    drawn = [module for module in found if module.spectrum and max(module.spectrum) > 0]
    lost = [(place, module) for place, module in enumerate(found) if module.discarded is not None]
    if not drawn and not lost:
        return None
    families = sorted({module.family for module in found})
    looks = {family: i % len(SERIES_MARKERS) for i, family in enumerate(families)}
    count = int(bool(drawn)) + int(bool(lost))
    figure = new_figure(theme, 0.5 + height_of(theme, count, 2, 3.0))
    panels = panels_in(figure, theme, count, 2)
    if drawn:
        _spectra(panels[0], drawn, looks, theme)
    if lost:
        _losses(panels[-1], lost, looks, theme)
    legend_above(figure, theme)
    return figure


def _losses(axes: Axes, lost: list[tuple[int, Module]], looks: dict[str, int], theme: Theme) -> None:
    for place, module in lost:
        look = looks[module.family]
        colour, marker = theme.series[look], SERIES_MARKERS[look]
        name = label(module.family)
        axes.scatter([place], [100 * (module.discarded or 0.0)], s=22, color=colour, marker=marker, lw=0, label=name)
    entitle(axes, "energy discarded at the adapter's rank, %", theme)
    axes.set_xlabel("modules, in the order of the table")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.margins(x=0.05)


def _spectra(axes: Axes, drawn: list[Module], looks: dict[str, int], theme: Theme) -> None:
    shown = max(_SHOWN, *(2 * (module.rank or 0) for module in drawn))
    for module in drawn:
        colour, marker = theme.series[looks[module.family]], SERIES_MARKERS[looks[module.family]]
        relative = [max(value / max(module.spectrum), _FLOOR) for value in module.spectrum[:shown]]
        alpha, name = 0.35 if len(drawn) > 24 else 0.8, label(module.family)
        places = range(1, len(relative) + 1)
        axes.plot(places, relative, color=colour, marker=marker, ms=3.5, lw=0.9, alpha=alpha, label=name)
        if module.rank is not None and 1 <= module.rank <= len(relative):
            at = relative[module.rank - 1]
            axes.scatter([module.rank], [at], s=70, facecolor="none", edgecolor=theme.ink, lw=0.9, alpha=0.7, zorder=4)
    axes.scatter([], [], s=70, facecolor="none", edgecolor=theme.ink, label="chosen rank")
    ranks = {module.rank for module in drawn}
    if len(ranks) == 1 and None not in ranks:
        axes.axvline(ranks.pop() or 0, color=theme.ink, lw=0.8, ls=":")
    entitle(axes, "spectrum of each module, relative to its largest value", theme)
    cut = f", first {shown}" if any(len(module.spectrum) > shown for module in drawn) else ""
    axes.set_xlabel(f"place in the spectrum{cut}")
    axes.set_yscale("log")
    plain_numbers(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
