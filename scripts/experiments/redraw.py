"""Draws the figures of docs/results again from the csv files beside them; nothing is computed anew.

python -m scripts.experiments.redraw                    # all of them
python -m scripts.experiments.redraw --only noise flags
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts import PROJECT
from scripts.experiments import attack_report, flag_figures, noise, sensitivity_report
from scripts.experiments import sensitivity_figures as sensitivities
from scripts.experiments.attack_figures import draw_global, draw_personal

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def sensitivity(folder: Path) -> None:
    for deltas in sorted(folder.glob("**/deltas.csv")):
        sensitivities.draw_layers(read(deltas), deltas.parent / "layers.png")
        sensitivities.draw_steps(read(deltas), deltas.parent / "steps.png")
    for ratios in sorted(folder.glob("**/ratios.csv")):
        published = {name: entry[3] for name, entry in sensitivity_report.RATIOS.items()}
        sensitivities.draw_ratios(read(ratios), published, ratios.parent / "ratios.png")


def attacks(folder: Path) -> None:
    table = attack_report.Table(read(folder / "attacks.csv"))
    draw_global(table, folder / "global.png")
    draw_personal(table, folder / "personal.png")


def flags(folder: Path) -> None:
    for stem in ("held_out", "tuning", "weak", "dirichlet", "heavy_tails"):
        flag_figures.draw(read(folder / f"{stem}.csv"), folder / f"{stem}.png")


def noises(folder: Path) -> None:
    noise.draw(read(folder / "noise.csv"), folder / "noise.png")


FIGURES: dict[str, Callable[[Path], None]] = {
    "sensitivity": sensitivity,
    "attacks": attacks,
    "flags": flags,
    "noise": noises,
}


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(FIGURES), default=list(FIGURES))
    parser.add_argument("--results", type=Path, default=PROJECT / "docs" / "results", help="default: %(default)s")
    args = parser.parse_args(given)
    for name in args.only:
        FIGURES[name](args.results / name)
        print(f"{name}: drawn")


if __name__ == "__main__":
    main()
