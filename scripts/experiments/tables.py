"""How the experiments write what they find: csv and markdown beside each other, and figures in one style."""
# SPDX-License-Identifier: Apache-2.0

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts import PROJECT

Row = Mapping[str, str | int | float]
# Okabe-Ito: told apart with every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def arguments(name: str, text: str) -> argparse.Namespace:
    """--seed, --seeds, --quick, --output_dir: the flags all experiments have."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds")
    parser.add_argument("--quick", action="store_true", help="a few cells only, to see that it runs")
    default = PROJECT / "docs" / "results" / name
    parser.add_argument("--output_dir", type=Path, default=default)
    found = parser.parse_args()
    found.output_dir.mkdir(parents=True, exist_ok=True)
    return found


def write_csv(place: Path, rows: Sequence[Row]) -> None:
    with open(place, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write(folder: Path, name: str, rows: Sequence[Row], title: str, command: str, remark: str = "") -> None:
    """NAME.csv and README.md, with the command that made them."""
    write_csv(folder / f"{name}.csv", rows)
    lines = [f"# {title}", "", f"`{command}`", ""]
    lines += [remark, ""] if remark else []
    lines += ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(_cell(value) for value in row.values()) + " |" for row in rows]
    lines += ["", f"![{title}]({name}.png)", ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _cell(value: str | int | float) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
