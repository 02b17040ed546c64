"""The comparison as files: tables.md (means, spreads, paired differences) and a figure, from the rows of cells.csv."""
# SPDX-License-Identifier: Apache-2.0

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt

from scripts.common import markdown
from scripts.experiments.tables import COLOURS

Row = dict[str, str | int | float]
KINDS = ("global", "local")
REFERENCE = "fedavg"
WHOLE = "pipeline"
# What is held against each other, seed by seed: first minus second.
CONTRASTS = (
    (WHOLE, "fedavg"),
    (WHOLE, "without global stage"),
    (WHOLE, "without local stage"),
    ("dirmag_mean", "fedavg"),
    ("dirmag_mean", "product_mean"),
    (WHOLE, "pipeline, product_mean"),
    (WHOLE, "pipeline, clair"),
)


@dataclass(frozen=True)
class Choice:
    """One method's rows at the rates that the first seed's validation loss chose, one a seed; how many were tried."""

    rows: dict[int, Row]
    tried: int

    @property
    def rate(self) -> float:
        return float(next(iter(self.rows.values()))["rate"])

    @property
    def rates(self) -> str:
        """The learning rate and, where there is one, that of the personal steps."""
        personal = next(iter(self.rows.values()))["personal_rate"]
        return f"{self.rate:g}" + (f", {float(personal):g}" if personal != "" else "")

    def values(self, column: str) -> dict[int, float]:
        """{seed: value}; empty where the column was not measured."""
        return {seed: float(row[column]) for seed, row in self.rows.items() if row.get(column, "") != ""}


def choose(rows: Iterable[Row], kind: str, personal_rate: float | None = None) -> Choice:
    """Of one method's rows on one dataset: the setting of the least validation loss in the first seed, for the "global"
    or the "local" number. personal_rate: keep to this one, where there is a choice."""
    settings: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        if personal_rate is None or row["personal_rate"] == "" or float(row["personal_rate"]) == personal_rate:
            setting = (str(row["rate"]), str(row["personal_rate"]))
            settings.setdefault(setting, {})[int(row["seed"])] = row
    first = min(seed for found in settings.values() for seed in found)
    tried = [found for found in settings.values() if first in found]
    # Later seeds ran the rates that were chosen at the default personal rate; another one has no seeds to compare.
    most = max(map(len, tried)) if personal_rate is None else 1
    whole = [found for found in tried if len(found) >= most]
    return Choice(min(whole, key=lambda found: float(found[first][f"{kind}_validation_loss"])), len(tried))


def differences(first: Choice, second: Choice, column: str) -> list[float]:
    """first - second, seed by seed, of the seeds that both have."""
    ours, theirs = first.values(column), second.values(column)
    return [ours[seed] - theirs[seed] for seed in sorted(ours) if seed in theirs]


def spread(values: Sequence[float], sign: str = "") -> str:
    """mean ± standard deviation between seeds."""
    if not values:
        return "-"
    return f"{statistics.fmean(values):{sign}.4f} ± {statistics.stdev(values) if len(values) > 1 else 0:.4f}"


def write_report(folder: Path, rows: Sequence[Row], environment: str, default_rate: float) -> None:
    """tables.md and comparison.png. default_rate: of the personal steps, where it is not chosen."""
    parts = ["# Pipeline and baselines", f"Written by `pipeline_comparison.py`. {environment}."]
    for data in _distinct(rows, "data"):
        own = [row for row in rows if row["data"] == data]
        for kind in KINDS:
            chosen = {method: choose(_of(own, method), kind, default_rate) for method in _distinct(own, "method")}
            seeds = ", ".join(map(str, sorted(next(iter(chosen.values())).rows)))
            parts += [f"## {data}: {kind} loss, seeds {seeds}", markdown(method_table(chosen, kind))]
            if kind == "local":
                both = {method: choose(_of(own, method), kind) for method in chosen}
                more = {m: choice for m, choice in both.items() if choice.tried > chosen[m].tried}
                if more:
                    table = markdown(method_table({REFERENCE: chosen[REFERENCE], **more}, kind))
                    parts += [
                        f"### {data}: the personal stage's rate chosen too (more tries than the baselines)",
                        table,
                    ]
            contrasts = contrast_table(chosen, kind)
            parts += [f"### {data}: {kind} loss, paired differences", markdown(contrasts)] if contrasts else []
    (folder / "tables.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    draw(rows, default_rate, folder / "comparison.png")


def method_table(chosen: dict[str, Choice], kind: str) -> list[Row]:
    """One line a method: test loss, its difference to FedAvg of the same seeds, accuracy, ROUGE-L where measured."""
    column, lines = f"{kind}_test_loss", []
    for method, choice in chosen.items():
        values = list(choice.values(column).values())
        line: Row = {"method": method, "rate": "-" if method == "base" else choice.rates, "tried": choice.tried}
        line["test loss"] = spread(values)
        if REFERENCE in chosen:
            gaps = differences(choice, chosen[REFERENCE], column)
            base = statistics.fmean(chosen[REFERENCE].values(column).values())
            line["minus fedavg"] = spread(gaps, "+")
            line["in %"] = f"{100 * statistics.fmean(gaps) / base:+.2f}"
            line["lower in"] = f"{sum(gap < 0 for gap in gaps)} of {len(gaps)}"
        for name in ("token_accuracy", "rouge_l"):
            if found := list(choice.values(f"{kind}_test_{name}").values()):
                line[name] = spread(found)
        lines.append(line)
    return lines


def contrast_table(chosen: dict[str, Choice], kind: str) -> list[Row]:
    """One line a contrast: test loss of the first less that of the second, seed by seed; negative: the first wins."""
    lines: list[Row] = []
    for first, second in CONTRASTS:
        if first in chosen and second in chosen:
            gaps = differences(chosen[first], chosen[second], f"{kind}_test_loss")
            lines.append(
                {
                    "first": first,
                    "second": second,
                    "first - second": spread(gaps, "+"),
                    "each seed": ", ".join(f"{gap:+.4f}" for gap in gaps),
                }
            )
    return lines


def draw(rows: Sequence[Row], default_rate: float, path: Path) -> None:
    """Test loss less FedAvg's of the same seed: a dot a seed, a bar their mean; left of the line is better."""
    names = _distinct(rows, "data")
    methods = [method for method in _distinct(rows, "method") if method not in (REFERENCE, "base")]
    figure, panels = plt.subplots(
        len(names), 2, figsize=(10, 0.8 + len(names) * (0.5 + 0.26 * len(methods))), squeeze=False, layout="constrained"
    )
    for line, data in zip(panels, names, strict=True):
        own = [row for row in rows if row["data"] == data]
        for axes, kind in zip(line, KINDS, strict=True):
            reference = choose(_of(own, REFERENCE), kind, default_rate)
            for y, method in enumerate(methods):
                choice = choose(_of(own, method), kind, default_rate)
                gaps = differences(choice, reference, f"{kind}_test_loss")
                colour = COLOURS[1] if method.startswith(("pipeline", "without")) else COLOURS[0]
                axes.scatter(gaps, [y] * len(gaps), s=14, color=colour, alpha=0.7)
                axes.scatter([statistics.fmean(gaps)], [y], marker="|", s=170, color=colour)
            axes.axvline(0, color="#666666", ls="--", lw=1)
            axes.set_yticks(range(len(methods)), methods if kind == "global" else [""] * len(methods), fontsize=8)
            axes.invert_yaxis()
            axes.grid(axis="x", alpha=0.25)
            axes.set_title(f"{data}: {kind} test loss less FedAvg's", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _of(rows: Iterable[Row], method: str) -> list[Row]:
    return [row for row in rows if row["method"] == method]


def _distinct(rows: Iterable[Row], key: str) -> list[str]:
    return list(dict.fromkeys(str(row[key]) for row in rows))
