"""Numbers given to commands on a finished run, to the demo and to aggregate: one line, before anything is loaded."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest

from fedlora_hf.cli import main


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ask", "out", "--max_new_tokens", "0", "why?"], "max_new_tokens=0: must be at least 1; leave it out for 64"),
        (["demo", "--seed", "-1"], "seed=-1: must be a whole number from 0 to 2^32 - 1; 42 for instance"),
        (["evaluate", "out", "--dataset", "x", "--max_new_tokens", "-3"], "max_new_tokens=-3: must be at least 1"),
        (
            ["evaluate", "out", "--dataset", "x", "--per_device_eval_batch_size", "0"],
            "per_device_eval_batch_size=0: must",
        ),
        (["aggregate", "a", "b", "--output_dir", "c", "--functional_judges", "-1"], "functional_judges=-1: must be at"),
    ],
)
def test_a_number_that_cannot_be_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fedlora: error: {said}")
    assert list(tmp_path.iterdir()) == []
