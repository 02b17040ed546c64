"""The table of constants in docs/clair.md is what the code says: every constant is in it, with the code's value."""
# SPDX-License-Identifier: Apache-2.0

import ast
import importlib
import math
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| `([\w.]+)` \| ([^|]+) \|", re.MULTILINE)
CLAIR = "fedlora_hf.numerics.clair"
BESIDE = ("aggregation.over_rounds", "rounds.judges", "rounds.panel", "methods.clair")


def rows() -> dict[str, str]:
    """{constant: its value as the table writes it}."""
    text = (ROOT / "docs" / "clair.md").read_text(encoding="utf-8")
    found = ROW.findall(text.split("## Constants")[1].split("\n## ")[0])
    assert len(dict(found)) == len(found), "a constant has two rows"
    return dict(found)


def module(name: str) -> ModuleType:
    return importlib.import_module(f"fedlora_hf.{name}" if name in BESIDE else f"{CLAIR}.{name}")


def numbers(name: str) -> set[str]:
    """The constants of a module that are numbers: names in capitals that it assigns itself."""
    source = ast.parse(Path(str(module(name).__file__)).read_text(encoding="utf-8"))
    targets = [target for node in source.body if isinstance(node, ast.Assign) for target in node.targets]
    names = [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
    return {n for n in names if n.isupper() and len(n) > 1 and isinstance(getattr(module(name), n), int | float)}


def value(text: str, **names: float) -> float:
    return float(eval(text, {"__builtins__": {}, "log": math.log, **names}))


def test_every_constant_has_its_row_and_every_row_its_constant() -> None:
    files = sorted((ROOT / "fedlora_hf" / "numerics" / "clair").glob("[a-z]*.py"))
    places = [*(path.stem for path in files), *BESIDE]
    in_code = {f"{place}.{name}" for place in places for name in numbers(place)}
    assert {name for name in rows() if name.rpartition(".")[2].isupper()} == in_code
    assert len(in_code) > 30


@pytest.mark.parametrize(("name", "text"), rows().items())
def test_the_table_has_the_value_of_the_code(name: str, text: str) -> None:
    place, _, constant = name.rpartition(".")
    found = getattr(module(place), constant)
    if callable(found):
        assert [found(K) for K in (8, 20, 100)] == pytest.approx([value(text, K=K) for K in (8, 20, 100)])
    else:
        assert value(text) == pytest.approx(found, rel=1e-12)
