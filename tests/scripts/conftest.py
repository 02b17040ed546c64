"""The modules of the experiment that a test file names in NAMES."""
# SPDX-License-Identifier: Apache-2.0

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[2] / "scripts" / "experiments"


@pytest.fixture(scope="module")
def scripts(request: pytest.FixtureRequest) -> Iterator[dict[str, ModuleType]]:
    """{name: module} of the test file's NAMES, imported as the script imports them, and forgotten afterwards."""
    names = request.module.NAMES
    before = list(sys.path)
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        yield {name: __import__(name) for name in names}
    finally:
        sys.path[:] = before
        for name in (*names, "common"):
            sys.modules.pop(name, None)
