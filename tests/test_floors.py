"""The floors of the house: a module imports only from floors below its own, and never in a circle."""
# SPDX-License-Identifier: Apache-2.0

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fedlora_hf"
# What each name at the top of the package may lean on: everything on a lower floor, and its own folder.
FLOORS = [
    {"errors"},
    {"util", "launch", "options", "methods"},
    {"numerics"},
    {"update", "dirmag"},
    {"aggregation", "privacy"},
    {"config"},
    {"data", "adapter", "flags"},
    {"training"},
    {"record"},
    {"report", "hub"},
    {"rounds"},
    {"loading"},
    {"trainer"},
    {"using"},
    {"commands"},
    {"cli", "flower"},
    {"__main__", "__init__"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))
# Who may import PEFT, and the Hub's client.
GUARDED = {
    "peft": {"adapter", "dirmag", "training", "using"},
    "huggingface_hub": {"hub", "dirmag"},
    "flwr": {"flower"},
}


def part(path: Path) -> str:
    """The module or folder at the top of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it; names that are modules of the package are spelt out."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{a.name}" for a in node.names} if node.module == "fedlora_hf" else {node.module}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    own = part(path)
    assert own in FLOOR, f"{own}: say on which floor it stands"
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "fedlora_hf" and rest.split(".")[0] in FLOOR and own != "__init__":
            below = rest.split(".")[0]
            assert below == own or FLOOR[below] < FLOOR[own], f"{own} imports {below}, which is not below it"
        assert own in GUARDED.get(top, {own}), f"{own} imports {top}; only {', '.join(sorted(GUARDED[top]))} may"


def test_numerics_know_torch_and_arithmetic_alone() -> None:
    for path in (PACKAGE / "numerics").rglob("*.py"):
        allowed = {
            "torch",
            "math",
            "fedlora_hf",
            "collections",
            "dataclasses",
            "typing",
            "warnings",
            "functools",
            "enum",
        }
        assert {name.split(".")[0] for name in imports(path)} <= allowed | {"itertools", "enum"}, path


def test_no_circles_within_a_folder() -> None:
    names = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}
    below = {name: {n for n in from_package(path) if n in names and n != name} for name, path in names.items()}
    while below:
        free = [name for name, needs in below.items() if not needs & set(below)]
        assert free, f"a circle among {sorted(below)}"
        below = {name: needs for name, needs in below.items() if name not in free}


def from_package(path: Path) -> set[str]:
    """The modules of the package that a file needs when it is itself imported (not those under TYPE_CHECKING)."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fedlora_hf"):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            files = {PACKAGE.parent.joinpath(*name.split(".")) for name in inner}
            modules = {f for f in files if f.with_suffix(".py").is_file() or (f / "__init__.py").is_file()}
            found |= {".".join(f.relative_to(PACKAGE.parent).parts) for f in modules}
            found |= set() if len(modules) == len(inner) else {node.module}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_small(path: Path) -> None:
    """At most 350 lines a module and 60 a function."""
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 350
    functions = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    long = [n.name for n in functions if (n.end_lineno or n.lineno) - n.lineno >= 60]
    assert long == []


def test_the_top_of_the_package_is_small() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 10
