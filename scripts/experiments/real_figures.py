"""The figures of the experiments on real bases."""
# SPDX-License-Identifier: Apache-2.0

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedlora_hf.numerics.intervals import bootstrap
from scripts.experiments.drawing import COLOURS, GREY, MARKS, bar, figure, heat, save

Row = Mapping[str, Any]
DATA = {"tasks": "one task a client", "mixtures": "mixtures of tasks", "dolly": "Dolly by category"}
PUBLISHED = {"global": 0.39, "local": 0.59}


def draw_methods(rows: Sequence[Row], path: Path, reference: str) -> None:
    """Gain over the reference in % of its loss, global and personal adapters, 95 % intervals; a mark a source."""
    kept = [row for row in rows if not int(row["tuning"])]
    base = kept[0]["base"]
    kept = [row for row in kept if row["base"] == base]
    sources = list(dict.fromkeys(row["data"] for row in kept))
    methods = [m for m in dict.fromkeys(row["method"] for row in kept) if m not in (reference, "base")]
    canvas = figure(10.5, 1.5 + 0.5 * len(methods))
    panels = canvas.subplots(1, 2, sharey=True)
    for axes, (kind, title) in zip(panels, (("global", "global"), ("local", "personal")), strict=True):
        for number, data in enumerate(sources):
            shift = (number - (len(sources) - 1) / 2) * 0.24
            for y, method in enumerate(methods):
                values = _gains([row for row in kept if row["data"] == data], method, f"{kind}_loss", reference)
                if not values or (method == "local" and kind == "global"):
                    continue
                low, high = bootstrap(values, seed=0)
                axes.plot([low, high], [y + shift] * 2, color=COLOURS[number], lw=1.5)
                label = DATA.get(data, data) if kind == "local" and y == 0 else None
                style = {"color": COLOURS[number], "ms": 6, "label": label}
                axes.plot(statistics.fmean(values), y + shift, MARKS[number], **style)
        axes.axvline(0, color=GREY, ls="--", lw=1)
        axes.axvline(PUBLISHED[kind], color="black", lw=1, ls=":")
        axes.set_title(f"{title} adapters: gain over {reference}, % of its loss", fontsize=10)
        axes.set_xlabel(f"right is better; dotted: the published +{PUBLISHED[kind]} % (of task scores)", fontsize=8)
        axes.grid(axis="x", alpha=0.25)
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].set_ylim(len(methods) - 0.5, -0.5)
    canvas.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    save(canvas, path)


def _gains(rows: Sequence[Row], method: str, column: str, held: str) -> list[float]:
    reference = {(r["seed"], r["client"]): float(r[column]) for r in rows if r["method"] == held and r[column] != ""}
    own = {(r["seed"], r["client"]): float(r[column]) for r in rows if r["method"] == method and r[column] != ""}
    both = [key for key in own if key in reference]
    if not both:
        return []
    scale = statistics.fmean(reference[key] for key in both)
    return [100 * (reference[key] - own[key]) / scale for key in both]


def draw_attacks(rows: Sequence[Row], path: Path) -> None:
    """Heat maps of the honest clients' loss, one a kind of clients."""
    base = rows[0]["base"]
    splits = list(dict.fromkeys(row["split"] for row in rows if row["base"] == base))
    columns = {"alone": ("local", "personal_loss"), "FedAvg": ("fedavg", "global_loss")}
    columns |= {"MultiKrum": ("multikrum", "global_loss"), "CLAIR": ("clair", "global_loss")}
    columns["CLAIR, personal"] = ("clair", "personal_loss")
    canvas = figure(1.5 + 4.6 * len(splits), 4.2)
    panels = canvas.subplots(1, len(splits), squeeze=False)[0]
    for number, (axes, split) in enumerate(zip(panels, splits, strict=True)):
        own = [row for row in rows if row["base"] == base and row["split"] == split]
        attacks = list(dict.fromkeys(row["attack"] for row in own))
        values = np.array([[_mean(own, attack, *where) for where in columns.values()] for attack in attacks])
        names = attacks if number == 0 else [""] * len(attacks)
        low = float(values.min())
        image = heat(axes, values, names, list(columns), (low, low + 1.0), turned=True)
        axes.set_title(f"{split} clients: honest clients' loss", fontsize=10)
        bar(canvas, image, [axes], "nats a token", [round(low, 1), round(low + 1, 1)])
    save(canvas, path)


def _mean(rows: Sequence[Row], attack: str, rule: str, column: str) -> float:
    return statistics.fmean(float(row[column]) for row in rows if row["attack"] == attack and row["rule"] == rule)


def draw_protocol(rows: Sequence[Row], path: Path) -> None:
    """Loss against what was sent, one panel a first rate, one line a strategy."""
    base = rows[0]["base"]
    peaks = list(dict.fromkeys(row["peak"] for row in rows if row["base"] == base))
    strategies = list(dict.fromkeys(row["strategy"] for row in rows if row["base"] == base))
    canvas = figure(1.5 + 4.4 * len(peaks), 3.8)
    panels = canvas.subplots(1, len(peaks), squeeze=False)[0]
    for axes, peak in zip(panels, peaks, strict=True):
        own = [row for row in rows if row["base"] == base and row["peak"] == peak]
        for number, strategy in enumerate(strategies):
            mine = [row for row in own if row["strategy"] == strategy]
            if not mine:
                continue
            xs = sorted({float(row["megabytes"]) for row in mine})
            ys = [statistics.fmean(float(r["loss"]) for r in mine if float(r["megabytes"]) == x) for x in xs]
            style = {"color": COLOURS[number], "marker": MARKS[number], "label": strategy, "ms": 4}
            axes.plot(xs, ys, ls=("-", "--", ":", "-.", (0, (1, 1)))[number % 5], **style)
        axes.set_title(f"first rate {float(peak):g}", fontsize=10)
        axes.set_xlabel("MB sent, both ways")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("test loss, nats a token")
    canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    save(canvas, path)
