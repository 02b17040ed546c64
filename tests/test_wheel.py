"""The wheel holds the package alone, with its templates; not the tests, the trainers or the scripts."""
# SPDX-License-Identifier: Apache-2.0

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
NEEDED = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "fedlora_hf", "trainers", "scripts", "tests")


def _missing() -> list[str]:
    found = {name: importlib.util.find_spec(name) for name in ("build", "setuptools")}
    return [name for name, spec in found.items() if spec is None]


@pytest.mark.skipif(bool(_missing()), reason=f"not installed: {', '.join(_missing())}")
def test_the_wheel_holds_the_package_alone(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in NEEDED:
        path = PROJECT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.is_file():
            shutil.copy(path, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (top,) = [name for name in names if name.endswith("/top_level.txt")]
        assert archive.read(top).decode().split() == ["fedlora_hf"]
        (points,) = [name for name in names if name.endswith("/entry_points.txt")]
        assert "fedlora = fedlora_hf.cli:main" in archive.read(points).decode()
    assert {name.split("/")[0] for name in names} == {"fedlora_hf", top.split("/")[0]}
    here = {str(path.relative_to(PROJECT)) for path in (PROJECT / "fedlora_hf").rglob("*.py")}
    here |= {str(path.relative_to(PROJECT)) for path in (PROJECT / "fedlora_hf").rglob("*.jinja")}
    assert here <= set(names)
    assert any(name.endswith(".jinja") for name in names)
    assert "fedlora_hf/py.typed" in names
