"""The README is true: its table of methods is the registry's, and every path it names exists."""
# SPDX-License-Identifier: Apache-2.0

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_methods_is_the_registrys():
    script = runpy.run_path(str(ROOT / "scripts" / "update_readme.py"))
    assert script["with_table"](README) == README, "run python scripts/update_readme.py"


def test_every_linked_file_exists():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []


def test_the_floor_plan_names_every_module():
    plan = README.split("## Where things are")[1]
    modules = {path.stem for path in (ROOT / "fedlora_hf").glob("[a-z]*.py")}
    modules |= {path.parent.name for path in (ROOT / "fedlora_hf").glob("*/__init__.py")}
    assert sorted(name for name in modules if not re.search(rf"\b{name}\b", plan)) == []
