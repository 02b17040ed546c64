"""The README is true: tables are those of the registry and of the measurements, and the floor plan is whole."""
# SPDX-License-Identifier: Apache-2.0

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_what_they_are_made_from():
    """The registry, and the measurements."""
    script = runpy.run_path(str(ROOT / "scripts" / "update_readme.py"))
    for path, text in script["updated"]().items():
        assert path.read_text(encoding="utf-8") == text, "run python scripts/update_readme.py"


def test_the_floor_plan_names_every_module():
    plan = README.split("## Where things are")[1]
    modules = {path.stem for path in (ROOT / "fedlora_hf").glob("[a-z]*.py")}
    modules |= {path.parent.name for path in (ROOT / "fedlora_hf").glob("*/__init__.py")}
    assert sorted(name for name in modules if not re.search(rf"\b{name}\b", plan)) == []
