"""Files whole or not at all, read within bounds, and never through a link."""
# SPDX-License-Identifier: Apache-2.0

import errno
import json
import os
import socket
from pathlib import Path

import pytest

from fedlora_hf.errors import StorageError
from fedlora_hf.util import disk
from fedlora_hf.util.disk import (
    is_disk_trouble,
    open_regular,
    parse_json,
    read_json,
    read_regular,
    remove_tree,
    sweep,
    within,
    write_atomically,
)


def test_a_write_that_fails_leaves_the_old_file_and_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('"\\ud800"', "surrogates not allowed"),
        ('["\\uD800"]', "surrogates not allowed"),
        ("{'a': 1}", "Expecting"),
    ],
)
def test_texts_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_what_json_may_hold() -> None:
    assert parse_json('{"a": [1, 2.5, "\\ud83d\\ude00", null]}') == {"a": [1, 2.5, "\U0001f600", None]}
    assert parse_json("9" * 18) == int("9" * 18)
    assert parse_json("9" * 400) == float("inf")
    assert isinstance(parse_json("9" * 19), float)


def test_a_file_is_read_within_its_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(list(range(100))))
    assert read_json(path, 1000) == list(range(100))
    with pytest.raises(ValueError, match="larger than"):
        read_json(path, 100)
    monkeypatch.setattr(disk, "MAX_JSON_VALUES", 99)
    with pytest.raises(ValueError, match="more than 99 values"):
        read_json(path, 1000)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none", 1000)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_plain_file_is_not_waited_for(tmp_path: Path, make: object) -> None:
    make(tmp_path / "x")  # type: ignore[operator]
    with pytest.raises(ValueError, match="not a plain file"):
        read_json(tmp_path / "x", 1000)


def test_a_link_inside_is_refused_and_the_folder_itself_may_be_one(tmp_path: Path) -> None:
    (tmp_path / "real" / "a").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert within(tmp_path / "link", "a", "b") == tmp_path / "link" / "a" / "b"
    with pytest.raises(StorageError, match="link: is a link"):
        within(tmp_path, "link", "a")


def test_removing_takes_the_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    remove_tree(tmp_path / "link")
    remove_tree(tmp_path / "none")
    assert [path.name for path in tmp_path.iterdir()] == ["real"]
    remove_tree(tmp_path / "real" / "file")
    remove_tree(tmp_path / "real")
    assert not list(tmp_path.iterdir())


def test_a_removal_that_is_interrupted_leaves_nothing_in_sight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "3" / "clients").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *args, **kwargs: None)
        remove_tree(tmp_path / "3")
    assert [path.name for path in tmp_path.iterdir()] == [".3.gone"]
    (tmp_path / ".x.json.1.tmp").touch()
    (tmp_path / ".keep").touch()
    (tmp_path / ".link.tmp").symlink_to("/nowhere")
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".keep"]


def test_troubles_of_the_disk_are_told_from_others() -> None:
    assert is_disk_trouble(OSError(errno.ENOSPC, "full"))
    assert is_disk_trouble(OSError(errno.EFBIG, "large"))
    assert not is_disk_trouble(OSError(errno.ENOENT, "none"))
    assert not is_disk_trouble(ValueError())


@pytest.mark.parametrize("kind", ["fifo", "socket", "folder", "link to a device", "link to a pipe"])
def test_only_plain_files_are_opened_and_nothing_is_waited_for(tmp_path: Path, kind: str) -> None:
    path, listening = tmp_path / "x", socket.socket(socket.AF_UNIX)
    with listening:
        if kind == "socket":
            listening.bind(str(path))
        elif kind == "link to a pipe":
            os.mkfifo(tmp_path / "pipe")
            path.symlink_to(tmp_path / "pipe")
        else:
            {"fifo": os.mkfifo, "folder": os.mkdir, "link to a device": lambda p: p.symlink_to("/dev/zero")}[kind](path)
        with pytest.raises(ValueError, match="not a plain file"):
            open_regular(path)
        with pytest.raises(ValueError, match="not a plain file"):
            read_regular(path, 10)


def test_a_pipe_put_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    facts = os.stat(tmp_path / "file")
    handles = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda *args, **kwargs: facts)  # what was there when it was asked
        with pytest.raises(ValueError, match="not a plain file"):
            open_regular(tmp_path / "pipe")
    assert len(os.listdir("/proc/self/fd")) == len(handles)


def test_a_link_to_a_file_is_followed_and_its_size_bounded(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"abc")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert read_regular(tmp_path / "link") == read_regular(tmp_path / "link", 3) == b"abc"
    with pytest.raises(ValueError, match="larger than 0 KiB"):
        read_regular(tmp_path / "link", 2)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")


def test_a_draft_is_never_written_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    monkeypatch.setattr(disk.secrets, "token_hex", lambda count: "guessed")
    (tmp_path / f".file.{os.getpid()}.guessed.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "file", b"new")
    assert victim.read_bytes() == b"precious"
    (tmp_path / "file").symlink_to(victim)  # the file's own place may be a link: it is replaced
    monkeypatch.undo()
    write_atomically(tmp_path / "file", b"new")
    assert (victim.read_bytes(), (tmp_path / "file").read_bytes()) == (b"precious", b"new")
    assert not (tmp_path / "file").is_symlink()


def test_a_file_has_the_rights_that_the_umask_leaves(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"new")
    (tmp_path / "other").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode
