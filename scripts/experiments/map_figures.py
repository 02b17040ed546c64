"""The validity map as heat maps: recall, precision and false positives over splits and contaminations."""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from scripts.experiments.map_clients import SPLITS
from scripts.experiments.map_detection import Row

MEASURES = {"recall": "recall", "precision": "precision", "false_positive_rate": "false-positive rate"}


def heat_maps(table: Sequence[Row], title: str, path: Path) -> None:
    """One panel a measure, one row a contamination and share, one column a split, from alike to disjoint.

    A dash: nothing was flagged, so there is no precision. Empty: no such cell. Under each split the share of cohorts
    in which CLAIR found a common structure."""
    found = {(str(row["kind"]), float(row["share"]), str(row["split"])): row for row in table}
    lines = list(dict.fromkeys((kind, share) for kind, share, _ in found))
    figure, axes = plt.subplots(1, len(MEASURES), figsize=(12, 1.6 + 0.3 * len(lines)), layout="constrained")
    for axis, (measure, label) in zip(axes, MEASURES.items(), strict=True):
        shown = [line for line in lines if line[1] > 0 or measure == "false_positive_rate"]
        cells = [[_value(found.get((*line, split)), measure) for split in SPLITS] for line in shown]
        axis.imshow(
            cells, cmap="Reds" if measure == "false_positive_rate" else "cividis", vmin=0, vmax=1, aspect="auto"
        )
        for y, (line, values) in enumerate(zip(shown, cells, strict=True)):
            for x, (split, value) in enumerate(zip(SPLITS, values, strict=True)):
                dark = value < 0.5 if measure != "false_positive_rate" else value > 0.5
                text = f"{value:.2f}" if not math.isnan(value) else "–" if (*line, split) in found else ""
                axis.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
        axis.set_xticks(range(len(SPLITS)), [_column(split, table) for split in SPLITS], fontsize=7)
        axis.set_yticks(range(len(shown)), [_line(*line) for line in shown])
        axis.tick_params(axis="y", labelsize=7)
        axis.set_title(label, fontsize=9)
    figure.suptitle(f"{title}: CLAIR's flags (percentage under a split: cohorts called identifiable)", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _value(row: Row | None, measure: str) -> float:
    return math.nan if row is None else float(row[measure])


def _line(kind: str, share: float) -> str:
    return f"{kind.replace('_', ' ')} {share:.0%}" if share else "clean"


def _column(split: str, table: Sequence[Row]) -> str:
    rows = [row for row in table if row["split"] == split]
    cohorts = sum(int(row["cohorts"]) for row in rows)
    identifiable = sum(float(row["identifiable"]) * int(row["cohorts"]) for row in rows)
    name = split.replace(" ", "\n") if " " in split else f"{split}\n"
    return f"{name}\n{identifiable / cohorts:.0%}" if cohorts else name
