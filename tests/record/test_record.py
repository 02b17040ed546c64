"""The run record: the same text for the same run, whole on disk or not there, refused when it is not a record."""
# SPDX-License-Identifier: Apache-2.0

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import sample_record
import torch

from fedlora_hf import load_run
from fedlora_hf.errors import RecordError
from fedlora_hf.record.record import RunRecord, plain, versions
from fedlora_hf.util.disk import write_atomically

RECORD = sample_record.sample_record()


def test_a_record_survives_the_disk(tmp_path: Path) -> None:
    path = RECORD.save(tmp_path)
    assert path == tmp_path / "run.json"
    loaded = RunRecord.load(tmp_path)
    assert loaded.to_json() == RECORD.to_json()
    assert load_run(tmp_path).to_json() == RECORD.to_json()
    assert load_run(str(tmp_path)).flagged == RECORD.flagged
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_text_does_not_depend_on_the_order_of_keys(tmp_path: Path) -> None:
    content = json.loads(RECORD.to_json())
    backwards = RunRecord.from_dict({key: content[key] for key in reversed(content)})
    assert backwards.to_json() == RECORD.to_json()


def test_numbers_that_json_has_not_become_null() -> None:
    value = {"a": math.nan, 2: [math.inf, torch.tensor([1.0, -math.inf]), {3, 1}], "c": Path("x"), "d": True}
    assert plain(value) == {"a": None, "2": [None, [1.0, None], [1, 3]], "c": "x", "d": True}
    assert "NaN" not in RunRecord(kind="train", method="m", seed=0, metrics={"a": math.nan}).to_json()


def changed(**changes: Any) -> str:
    return json.dumps({**json.loads(RECORD.to_json()), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON (Expecting"),
        ("[" * 100_000, "not readable as JSON (nested too deeply)"),
        ("[1]", "holds a list; a run record is a JSON object"),
        ("{}", "schema_version None; this version reads 1"),
        (changed(schema_version=2), "schema_version 2; this version reads 1"),
        (changed(rounds={}), "rounds is a dict, must be a list"),
        (changed(seed="0"), "seed is a str, must be a int"),
        (changed(seed=True), "seed is a bool"),
        (changed(clients={"a": 3}), "every entry of clients must be an object"),
        (changed(rounds=[None]), "every entry of rounds must be an object"),
        ('{"schema_version": 1, "kind": "train"}', "key 'method' is missing"),
    ],
)
def test_what_is_not_a_record_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RecordError) as caught:
        RunRecord.load(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_keys_of_a_later_minor_version_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(changed(weather="fine"))
    assert RunRecord.load(tmp_path).to_json() == RECORD.to_json()


def test_missing_and_misnamed_runs(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"run\.json: no such file; give the output folder"):
        load_run(tmp_path)
    with pytest.raises(RecordError, match="neither an existing folder nor a Hub repository id"):
        load_run("no_such_folder")
    with pytest.raises(RecordError, match="neither an existing folder nor a Hub repository id"):
        load_run("./no/such")


def test_a_file_is_replaced_whole_or_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file"
    write_atomically(path, b"old")

    def crash(source: object, target: object) -> None:
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(OSError, match="power cut"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_versions_are_of_what_moves_numbers() -> None:
    found = versions()
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert {"python", "transformers", "peft", "numpy"} <= set(found)
