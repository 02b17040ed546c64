"""What is published: a source distribution that builds the wheel and little else, and a wheel of the package alone."""
# SPDX-License-Identifier: Apache-2.0

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
# All that lies beside the package in a checkout, so that a rule that takes in too much is seen.
BESIDE = ("trainers", "scripts", "tests", "model_cards", "docs")
FILES = ("setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff")


def _missing() -> list[str]:
    found = {name: importlib.util.find_spec(name) for name in ("build", "setuptools")}
    return [name for name, spec in found.items() if spec is None]


pytestmark = pytest.mark.skipif(bool(_missing()), reason=f"not installed: {', '.join(_missing())}")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both, the wheel built from the source distribution."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    source.mkdir()
    for name in FILES:
        shutil.copy(PROJECT / name, source / name)
    for name in ("fedlora_hf", *BESIDE):
        shutil.copytree(PROJECT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return folder


def package_files() -> set[str]:
    """The package's files by their paths in the project: code, and what code reads."""
    found = (PROJECT / "fedlora_hf").rglob("*")
    return {str(p.relative_to(PROJECT)) for p in found if p.is_file() and p.suffix not in (".pyc", ".pyo")}


def test_the_wheel_holds_the_package_alone(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (top,) = [name for name in names if name.endswith("/top_level.txt")]
        assert archive.read(top).decode().split() == ["fedlora_hf"]
        (points,) = [name for name in names if name.endswith("/entry_points.txt")]
        assert "fedlora = fedlora_hf.cli:main" in archive.read(points).decode()
        (metadata,) = [name for name in names if name.endswith("/METADATA")]
        assert "License: Apache-2.0" in archive.read(metadata).decode()
    information = top.split("/")[0]
    assert {name.split("/")[0] for name in names} == {"fedlora_hf", information}
    assert {name for name in names if not name.startswith(information)} == package_files()
    assert any(name.endswith(".jinja") for name in names)
    assert "fedlora_hf/py.typed" in names


def test_the_source_distribution_builds_the_wheel_and_holds_nothing_odd(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    made = {name for name in names if name == "PKG-INFO" or name.startswith("fedlora_hf.egg-info/")}
    assert names - made == package_files() | set(FILES)
    assert path.stat().st_size < 1_000_000
    assert re.fullmatch(r"fedlora_hf-[\d.]+\.tar\.gz", path.name)
