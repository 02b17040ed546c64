"""The recordings in docs/ are of the commands there are, and those that cost nothing are as they would be today."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest

from fedlora_hf.commands.listing import ABOUT
from scripts import record_terminal as recorder


def test_every_command_has_its_recording_and_no_recording_is_left_over() -> None:
    told = {scene.command.split()[1] for scene in recorder.STORY}
    assert set(ABOUT) - told == {"demo"}  # whose output stands in the README
    files = {path.name for path in recorder.RECORDINGS.iterdir()}
    assert files == {"README.md", *(f"{scene.name}.txt" for scene in recorder.STORY)}
    assert (recorder.RECORDINGS / "README.md").read_text(encoding="utf-8") == recorder.index()
    for scene in recorder.STORY:
        text = (recorder.RECORDINGS / f"{scene.name}.txt").read_text(encoding="utf-8")
        assert text.startswith(f"$ {scene.command}\n")
        assert text.endswith(f"(exit code {scene.code})\n") == bool(scene.code)


@pytest.mark.parametrize("name", ["help", "methods", "typo"])
def test_what_costs_nothing_is_as_it_was_recorded(name: str, tmp_path: Path) -> None:
    (scene,) = (scene for scene in recorder.STORY if scene.name == name)
    text = (recorder.RECORDINGS / f"{name}.txt").read_text(encoding="utf-8")
    assert recorder.record(scene, tmp_path) == text, "run python scripts/record_terminal.py"


def test_what_differs_from_run_to_run_is_replaced(tmp_path: Path) -> None:
    printed = f"{tmp_path}/out at 2026-01-02T03:04:05+00:00\nround 1/3: 3 clients, 12.3 s\n\n\n\n26.6 % of its time.\n"
    printed += "FutureWarning: x\nloss 1.234  \n"
    wanted = "/home/you/out at (date)\nround 1/3: 3 clients, #.# s\n\n# % of its time.\nloss 1.234\n"
    assert recorder.normalised(printed, tmp_path) == wanted


def test_a_command_that_ends_otherwise_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exit code 2, not 0"):
        recorder.record(recorder.Scene("bad", "fedlora report nowhere", ""), tmp_path)
