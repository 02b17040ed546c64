"""One step of results.py taken again elsewhere, and what its csv files say otherwise than those of docs/."""
# SPDX-License-Identifier: Apache-2.0

import csv
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

# Columns that a machine decides: times and what follows from them.
_TIMED = ("second", "ms", "time", "cpu", "wall", "ratio", "speed", "tokens/s")
_IN_PROJECT = ("fedlora_hf", "scripts", "setup.cfg", "pyproject.toml")

Cells = list[str]


def copied(project: Path, folder: Path) -> Path:
    """A copy of what the steps run, with docs/ as empty folders: whatever is found there afterwards is new."""
    for name in _IN_PROJECT:
        place = project / name
        if place.is_dir():
            shutil.copytree(place, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif place.exists():
            shutil.copy(place, folder / name)
    for place in (project / "docs", *(project / "docs").rglob("*")):
        if place.is_dir():
            (folder / place.relative_to(project)).mkdir(parents=True, exist_ok=True)
    return folder


def compared(project: Path, folder: Path, run: Callable[[Path], int], tolerance: float) -> list[str]:
    """Run a step in a copy of the project made in `folder`; one line for each difference from the project's docs/.

    tolerance: the largest relative difference of two numbers that is not told. Columns of times are left out.
    """
    code = run(copied(project, folder))
    if code:
        return [f"the step failed ({code})"]
    made = sorted((folder / "docs").rglob("*.csv"))
    if not made:
        return ["the step wrote no csv file that could be compared"]
    found = []
    for file in made:
        name = file.relative_to(folder)
        before = project / name
        lines = differences(before, file, tolerance) if before.exists() else iter(["is new"])
        found += [f"{name}: {line}" for line in lines]
    return found


def differences(before: Path, after: Path, tolerance: float) -> Iterator[str]:
    """What the second csv says otherwise; rows are told by their leading columns, up to the first with a fraction in
    it, and rows that are alike in those by their order. Rows that are only in the first are counted."""
    (old_names, old_rows), (names, rows) = _read(before), _read(after)
    if old_names != names:
        yield f"columns {', '.join(names)}, were {', '.join(old_names)}"
        return
    leading = min(_leading(old_rows), _leading(rows))
    old, new = _grouped(old_rows, leading), _grouped(rows, leading)
    absent = 0
    for key in dict.fromkeys([*new, *old]):
        for before_row, row in zip_longest(old.get(key, ()), new.get(key, ())):
            if row is None:
                absent += 1
            elif before_row is None:
                yield f"{_told(names, key)}: is new"
            else:
                for name, one, two in zip(names, before_row, row, strict=True):
                    if not _timed(name) and not _close(one, two, tolerance):
                        yield f"{_told(names, key)}: {name} is {two}, was {one}"
    if absent:
        yield f"{absent} of {len(old_rows)} rows were not made again"


def _read(path: Path) -> tuple[Cells, list[Cells]]:
    with path.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.reader(handle))
    return rows[0], rows[1:]


def _leading(rows: Sequence[Cells]) -> int:
    """How many columns stand before the first that has a fraction in some row."""
    width = min(map(len, rows), default=0)
    fractions = (n for n in range(width) if any(_number(row[n]) is not None and "." in row[n] for row in rows))
    return max(1, next(fractions, width))


def _grouped(rows: Sequence[Cells], leading: int) -> dict[tuple[str, ...], list[Cells]]:
    groups: dict[tuple[str, ...], list[Cells]] = {}
    for row in rows:
        groups.setdefault(tuple(row[:leading]), []).append(row)
    return groups


def _told(names: Cells, key: tuple[str, ...]) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(names, key, strict=False))


def _timed(name: str) -> bool:
    return any(part in name.lower() for part in _TIMED)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _close(one: str, two: str, tolerance: float) -> bool:
    first, second = _number(one), _number(two)
    if first is None or second is None:
        return one == two
    return abs(first - second) <= tolerance * max(abs(first), abs(second)) or first == second
