"""One writer a folder: another process is told who holds it, and a dead holder stops nobody."""
# SPDX-License-Identifier: Apache-2.0

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora_hf.errors import ConfigError, StorageError
from fedlora_hf.util.lock import HOLDER, LOCK, one_writer

HOLD = """
import sys, time
from fedlora_hf.util.lock import one_writer
with one_writer(sys.argv[1]):
    print(1, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path: Path):
    """Another process that holds the lock of the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"1\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_writer_is_refused_with_the_name_of_the_first(tmp_path: Path, other: subprocess.Popen) -> None:
    with (
        pytest.raises(ConfigError, match=rf"process {other.pid} on .* since .* is writing there; wait"),
        one_writer(tmp_path),
    ):
        pass


def test_a_killed_writer_stops_nobody(tmp_path: Path, other: subprocess.Popen) -> None:
    other.kill()
    other.wait()
    assert (tmp_path / LOCK).exists()
    with one_writer(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / HOLDER).read_text()
    assert list(tmp_path.iterdir()) == []


def test_the_holder_may_take_it_again(tmp_path: Path) -> None:
    with one_writer(tmp_path / "new"):
        with one_writer(tmp_path / "new"):
            pass
        assert (tmp_path / "new" / LOCK).exists()
    assert list((tmp_path / "new").iterdir()) == []


def test_a_folder_that_cannot_be_locked_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be locked"), one_writer(tmp_path / "file"):
        pass
