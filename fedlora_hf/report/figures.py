"""The figures of a report in the order of the page, each with the words that stand beside it."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure

from fedlora_hf.report import client_figures, module_figures, round_figures
from fedlora_hf.report.style import Theme
from fedlora_hf.report.view import Run


@dataclass(frozen=True)
class ReportFigure:
    """name: of the PNG and of the page's section. how: how to read it. missing: said when it cannot be drawn."""

    name: str
    title: str
    how: str
    missing: str
    draw: Callable[[Run, Theme], Figure | None]


FIGURES = (
    ReportFigure(
        "evidence",
        "Evidence per client",
        "Every client is compared with the others. A marker above its threshold (dashed; for all or for each) is "
        "evidence of contamination. Circles are collaborative clients; triangles are flagged ones, filled in the "
        "panels whose score is above its threshold. A triangle that is filled nowhere was flagged in an earlier round.",
        "No evidence about clients was recorded: the method does not flag clients, or no round was completed.",
        client_figures.evidence,
    ),
    ReportFigure(
        "similarity",
        "Similarity between clients",
        "Cosine between the updates of every two clients. Pairs that learned the same thing are blue, "
        "opposed pairs orange. Flagged clients stand last, behind the line.",
        "No similarity between clients was recorded.",
        client_figures.similarity,
    ),
    ReportFigure(
        "training",
        "Round by round",
        "Thin lines are single clients, dashed with triangles where flagged; thick lines are medians and means over "
        "the clients that were not flagged, with a band from the 10th to the 90th percentile of those clients.",
        "No loss, update norm or metric was recorded per round.",
        round_figures.training,
    ),
    ReportFigure(
        "clients",
        "What each client gained",
        "For every client's own test split: the base model (before), the global adapter, its personalised adapter and, "
        "where it was measured, training alone (local). The grey bar joins the values of one client.",
        "No metrics per client were recorded.",
        client_figures.gains,
    ),
    ReportFigure(
        "stages",
        "What each stage changed",
        "An arrow goes from the mean metric before a stage to the mean metric after it.",
        "No figure: the run had a single stage, or no metrics were recorded per round.",
        round_figures.stages,
    ),
    ReportFigure(
        "spectrum",
        "Spectrum and chosen rank",
        "A steep fall after the ring (the chosen rank) means that this rank holds most of what clients share. Energy "
        "discarded is what the global adapter lost when it was written at its rank.",
        "No spectrum or discarded energy was recorded: the method has none.",
        module_figures.spectrum,
    ),
    ReportFigure(
        "cost",
        "Traffic and time",
        "Bytes of adapters as they travel, all clients together, and wall-clock seconds, by part where they were "
        "recorded so.",
        "No bytes or seconds were recorded per round.",
        round_figures.cost,
    ),
)
