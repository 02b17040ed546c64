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
    sources = list(dict.fromkeys((row["base"], row["data"]) for row in kept))
    methods = [m for m in dict.fromkeys(row["method"] for row in kept) if m not in (reference, "base")]
    canvas = figure(10.5, 1.5 + 0.6 * len(methods))
    panels = canvas.subplots(1, 2, sharey=True)
    for axes, (kind, title) in zip(panels, (("global", "global"), ("local", "personal")), strict=True):
        for number, (base, data) in enumerate(sources):
            shift = (number - (len(sources) - 1) / 2) * 0.2
            own = [row for row in kept if (row["base"], row["data"]) == (base, data)]
            seeds = len({row["seed"] for row in own})
            label: str | None = f"{base}: {DATA.get(data, data)}, {seeds} seed{'s' if seeds > 1 else ''}"
            for y, method in enumerate(methods):
                values = _gains(own, method, f"{kind}_loss", reference)
                if not values:  # clients alone have no global adapter
                    continue
                low, high = bootstrap(values, seed=0)
                axes.plot([low, high], [y + shift] * 2, color=COLOURS[number], lw=1.5)
                style = {"color": COLOURS[number], "ms": 6, "label": label}
                axes.plot(statistics.fmean(values), y + shift, MARKS[number], **style)
                label = None
        axes.axvline(0, color=GREY, ls="--", lw=1)
        axes.axvline(PUBLISHED[kind], color="black", lw=1, ls=":")
        axes.set_title(f"{title} adapters: gain over {reference}, % of its loss", fontsize=10)
        axes.set_xlabel(f"right is better; dotted: the published +{PUBLISHED[kind]} % (of task scores)", fontsize=8)
        axes.grid(axis="x", alpha=0.25)
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].set_ylim(len(methods) - 0.5, -0.5)
    canvas.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
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
    """Heat maps of the honest clients' loss less that of the best rule in the row: one a base and kind of clients."""
    cohorts = list(dict.fromkeys((row["base"], row["split"]) for row in rows))
    columns = {"alone": ("local", "personal_loss"), "FedAvg": ("fedavg", "global_loss")}
    columns |= {"MultiKrum": ("multikrum", "global_loss"), "CLAIR": ("clair", "global_loss")}
    columns |= {"CLAIR, judges": ("clair, judges", "global_loss"), "its personal": ("clair, judges", "personal_loss")}
    canvas = figure(1.5 + 3.8 * len(cohorts), 4.2)
    panels = canvas.subplots(1, len(cohorts), squeeze=False)[0]
    for number, (axes, (base, split)) in enumerate(zip(panels, cohorts, strict=True)):
        own = [row for row in rows if (row["base"], row["split"]) == (base, split)]
        attacks = list(dict.fromkeys(row["attack"] for row in own))
        values = np.array([[_mean(own, attack, *where) for where in columns.values()] for attack in attacks])
        values = values - values.min(axis=1, keepdims=True)
        names = attacks if number == 0 else [""] * len(attacks)
        image = heat(axes, values, names, list(columns), (0.0, 0.5), turned=True)
        seeds = len({row["seed"] for row in own})
        clients = DATA.get(split, f"{split} clients")
        axes.set_title(f"{base}: {clients}, {seeds} seed{'s' if seeds > 1 else ''}", fontsize=10)
    bar(canvas, image, list(panels), "nats a token above the row's best", [0.0, 0.5])
    save(canvas, path)


def _mean(rows: Sequence[Row], attack: str, rule: str, column: str) -> float:
    return statistics.fmean(float(row[column]) for row in rows if row["attack"] == attack and row["rule"] == rule)


def draw_protocol(rows: Sequence[Row], path: Path) -> None:
    """Loss against what was sent, one panel a first rate, one line a strategy: of those that ran with every seed, since
    seeds differ by more than strategies."""
    base, every = rows[0]["base"], {row["seed"] for row in rows}
    ran = {s: {r["seed"] for r in rows if r["strategy"] == s} for s in dict.fromkeys(row["strategy"] for row in rows)}
    rows = [row for row in rows if ran[row["strategy"]] == every]
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
    shown = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    canvas.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, frameon=False)
    save(canvas, path)
