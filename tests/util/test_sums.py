"""Sums of a folder's files: as sha256sum reads them, and every kind of change is seen."""
# SPDX-License-Identifier: Apache-2.0

import shutil
import subprocess
from pathlib import Path

import pytest

from fedlora_hf.util.sums import SUMS, changed_file, read_sums, write_sums


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "clients" / "a").mkdir(parents=True)
    (tmp_path / "one").write_bytes(b"1")
    (tmp_path / "clients" / "a" / "two").write_bytes(b"2")
    write_sums(tmp_path)
    return tmp_path


def test_what_was_written_is_sound(folder: Path) -> None:
    assert sorted(read_sums(folder) or {}) == ["clients/a/two", "one"]
    assert changed_file(folder) is None


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_the_stock_tool_reads_them(folder: Path) -> None:
    subprocess.run(["sha256sum", "-c", SUMS], cwd=folder, check=True, capture_output=True)


def test_a_changed_file_is_named(folder: Path) -> None:
    (folder / "clients" / "a" / "two").write_bytes(b"3")
    assert changed_file(folder) == "clients/a/two is not the file that was written: its sha256 differs"
    assert changed_file(folder, below="clients/") is not None
    (folder / "clients" / "a" / "two").write_bytes(b"2")
    (folder / "one").write_bytes(b"")
    assert changed_file(folder, below="clients/") is None
    assert changed_file(folder) is not None


def test_a_missing_file_and_a_link_are_named_and_updates_may_go(folder: Path) -> None:
    shutil.rmtree(folder / "clients")
    assert changed_file(folder) is None
    (folder / "one").rename(folder / "elsewhere")
    assert changed_file(folder) == "one is missing"
    (folder / "one").symlink_to("elsewhere")
    assert changed_file(folder) == "one is missing"


def test_one_file_is_told_again_and_the_others_stay(folder: Path) -> None:
    (folder / "one").write_bytes(b"new")
    (folder / "clients" / "a" / "two").write_bytes(b"damaged")
    write_sums(folder, "one")
    assert changed_file(folder) == "clients/a/two is not the file that was written: its sha256 differs"


def test_without_sums_nothing_is_said_and_odd_sums_are_refused(folder: Path) -> None:
    (folder / SUMS).write_text("no sum\n")
    with pytest.raises(ValueError, match="holds what is no sum"):
        changed_file(folder)
    (folder / SUMS).unlink()
    assert read_sums(folder) is None
    assert changed_file(folder) is None
