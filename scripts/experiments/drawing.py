"""How figures look: one palette for lines, one for heat maps (darker is worse), plain numbers on logarithmic axes."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from scripts.experiments.tables import COLOURS

# Darker is worse in every heat map.
HEAT = "Blues"
GREY = "#666666"
MARKS = "os^Dv<>P"
DPI = 130
__all__ = ["COLOURS", "GREY", "MARKS", "bar", "figure", "heat", "log_axis", "save"]


def figure(width: float, height: float) -> Figure:
    """An empty figure whose parts are laid out without overlap."""
    return Figure(figsize=(width, height), layout="constrained")


def save(canvas: Figure, path: Path) -> None:
    canvas.savefig(path, dpi=DPI)


def heat(
    axes: Axes,
    values: Any,
    rows: Sequence[str],
    columns: Sequence[str],
    ends: tuple[float, float],
    *,
    text: Callable[[float], str] = "{:.2f}".format,
    logarithmic: bool = False,
    turned: bool = False,
) -> AxesImage:
    """A heat map with its numbers in it. ends: the values of the lightest and the darkest colour; turned: slanted
    column names. The image, for a colour bar."""
    norm = LogNorm(*ends, clip=True) if logarithmic else Normalize(*ends, clip=True)
    image = axes.imshow(values, aspect="auto", cmap=HEAT, norm=norm)
    for (line, column), value in np.ndenumerate(np.asarray(values, dtype=float)):
        colour = "white" if norm(value) > 0.55 else "black"
        axes.text(column, line, text(value), ha="center", va="center", fontsize=8, color=colour)
    slant = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if turned else {}
    axes.set_xticks(range(len(columns)), columns, fontsize=9, **slant)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def bar(canvas: Figure, image: AxesImage, axes: Sequence[Axes], label: str, ticks: Sequence[float]) -> None:
    """A colour bar for one or several heat maps of the same scale."""
    made = canvas.colorbar(image, ax=list(axes), label=label, shrink=0.9, pad=0.01)
    made.set_ticks(list(ticks), labels=[f"{tick:g}" for tick in ticks])
    made.ax.minorticks_off()


def log_axis(axis: Axis, subs: Sequence[float] = (1.0, 3.0)) -> None:
    """Plain numbers, not powers of ten, at `subs` times every power of ten."""
    axis.axes.set_yscale("log") if axis.axis_name == "y" else axis.axes.set_xscale("log")
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
