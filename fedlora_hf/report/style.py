"""How figures look: two themes in colours that colour-blind readers can tell apart, and how they become PNG bytes."""
# SPDX-License-Identifier: Apache-2.0

import io
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fedlora_hf.report.view import COLLABORATIVE, FLAGGED, LEFT_OUT, Run

WIDTH = 9.0  # inches; the page shows it about 95 pixels an inch, so 9 pt reads as 12 px
NARROW = 3.7  # inches; a window of 360 pixels shows it at about 85 an inch
_TITLE = 48  # letters of a panel's title that fit into a narrow figure
DPI = 160
MARKERS = {COLLABORATIVE: "o", LEFT_OUT: "s", FLAGGED: "^"}
VIEW_MARKERS = {"before": "s", "global": "o", "personalised": "D", "local": "X"}


@dataclass(frozen=True)
class Theme:
    """Colours of one theme. `series` is ordered; each place also has its own marker, so colour never stands alone."""

    surface: str
    ink: str
    muted: str
    grid: str
    good: str
    bad: str
    series: tuple[str, ...]
    width: float = WIDTH

    @property
    def narrow(self) -> bool:
        """For windows of a telephone's width: panels stand one above the other."""
        return self.width < WIDTH

    def state(self, state: str) -> str:
        return {COLLABORATIVE: self.good, FLAGGED: self.bad}.get(state, self.muted)

    def view(self, view: str) -> str:
        places = {"before": self.muted, "global": self.good, "personalised": self.series[1], "local": self.series[2]}
        return places.get(view, self.series[3])


# Okabe and Ito's palette; on the dark surface the same hues, lightened.
LIGHT = Theme(
    surface="#ffffff",
    ink="#1c2127",
    muted="#6b7480",
    grid="#e3e6ea",
    good="#0072b2",
    bad="#d55e00",
    series=("#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#d55e00", "#1c2127", "#8c8c8c"),
)
DARK = Theme(
    surface="#1a1e24",
    ink="#e6e9ed",
    muted="#98a2ae",
    grid="#323842",
    good="#56b4e9",
    bad="#ff8f4d",
    series=("#56b4e9", "#2ecc9a", "#e59ac6", "#f2c14e", "#9ad4f5", "#ff8f4d", "#e6e9ed", "#8c96a3"),
)


def narrowed(theme: Theme) -> Theme:
    return replace(theme, width=NARROW)


SERIES_MARKERS = ("o", "D", "v", "s", "P", "^", "X", "*")


def draw_png(draw: Callable[[Run, Theme], Figure | None], run: Run, theme: Theme) -> bytes | None:
    """The figure as PNG, or None when the record lacks its numbers. The user's own matplotlibrc has no say."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        cast(Any, matplotlib.rcParams).update(_settings(theme))
        figure = draw(run, theme)
        if figure is None:
            return None
        figure.set_dpi(DPI)
        buffer = io.BytesIO()
        # Not savefig, which goes over everything once more to lay it out before it draws.
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
        return buffer.getvalue()


def _settings(theme: Theme) -> dict[str, Any]:
    return {
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.titlecolor": theme.ink,
        "axes.labelcolor": theme.muted,
        "axes.edgecolor": theme.muted,
        "axes.linewidth": 0.7,
        "axes.facecolor": theme.surface,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.7,
        "figure.facecolor": theme.surface,
        "savefig.facecolor": theme.surface,
        "text.color": theme.ink,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "legend.frameon": False,
        "hatch.linewidth": 0.6,
        "hatch.color": theme.surface,
    }


def new_figure(theme: Theme, height: float, width: float = WIDTH) -> Figure:
    return Figure(figsize=(min(width, theme.width), height), layout="constrained")


def panels_in(figure: Figure, theme: Theme, count: int, most: int) -> list[Axes]:
    """`count` axes, at most `most` of them side by side, one under the other where it is narrow."""
    columns = 1 if theme.narrow else min(most, count)
    rows = -(-count // columns)
    return [figure.add_subplot(rows, columns, place) for place in range(1, count + 1)]


def height_of(theme: Theme, count: int, most: int, each: float) -> float:
    """Inches for `count` panels of `each` inches, placed as `panels_in` places them."""
    return each * -(-count // (1 if theme.narrow else min(most, count)))


def entitle(axes: Axes, text: str, theme: Theme) -> None:
    axes.set_title("\n".join(textwrap.wrap(text, _TITLE)) if theme.narrow else text)


def label(text: str, limit: int = 22) -> str:
    """Text from the record as a figure can show it: short, in the font's letters, never read as mathematics."""
    shown = "".join(c if c.isprintable() and ord(c) < 0x250 else "?" for c in text)
    if len(shown) > limit:
        shown = f"{shown[: limit - limit // 2 - 1]}…{shown[-(limit // 2) :]}"
    return shown.replace("$", r"\$")


def plain_numbers(axes: Axes) -> None:
    """Tick labels such as 0.01 and 100 on a logarithmic axis."""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def legend_above(figure: Figure, theme: Theme) -> None:
    """One legend over the whole figure, every name once."""
    unique: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            unique.setdefault(name, handle)
    if unique:
        ncols, size = (2, 8) if theme.narrow else (6, 9)
        handles, names = list(unique.values()), list(unique)
        figure.legend(handles, names, loc="outside upper left", ncols=ncols, fontsize=size, handletextpad=0.4)
