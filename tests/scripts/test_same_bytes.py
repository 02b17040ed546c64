"""The script that compares what two trees make: the same tree makes the same, and every kind of difference is named."""
# SPDX-License-Identifier: Apache-2.0

import copy
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "checks" / "same_bytes.py"


@pytest.fixture
def same_bytes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("same_bytes")


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def contents(**record: Any) -> dict[str, Any]:
    """What a FILE holds of one run with an adapter and a record."""
    files = {"adapter_model.safetensors": "a", "run.json": json.dumps(record, sort_keys=True)}
    return {"files": {"run": files}, "records": {"run": {"run.json": record}}}


def test_the_same_tree_makes_the_same_but_for_what_was_changed_by_hand(same_bytes: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "before.json"
    written = call("write", file, "--only", "classification")
    assert written.returncode == 0, written.stderr[-2000:]
    content = same_bytes.load(file)
    assert list(content["files"]) == ["classification"]
    hashes, record = content["files"]["classification"], content["records"]["classification"]["run.json"]
    assert {"adapter_config.json", "adapter_model.safetensors", "run.json", "rounds/2/run.json"} <= set(hashes)
    # The head that was trained in the rounds is no empty claim: the two rounds left different adapters.
    assert hashes["rounds/1/adapter_model.safetensors"] != hashes["rounds/2/adapter_model.safetensors"]
    assert not {"created", "versions", "command"} & set(record)
    hashes["adapter_model.safetensors"] = "0" * 64
    hashes["run.json"] = "0" * 64
    record["rounds"][1]["weights"]["client-02"] = 7.0
    same_bytes.save(file, content)
    compared = call("compare", file, "--only", "classification")
    assert compared.returncode == 1, compared.stderr[-2000:]
    lines = [line for line in compared.stdout.splitlines() if line.startswith("classification/")]
    assert lines[0] == "classification/adapter_model.safetensors: other bytes"
    assert lines[1].startswith("classification/run.json: rounds.1.weights.client-02: 7.0 -> 0.")
    assert len(lines) == 2


def test_every_kind_of_difference_is_named(same_bytes: ModuleType) -> None:
    before = contents(loss=[0.5, 0.25], flagged=[])
    assert same_bytes.differences(before, copy.deepcopy(before)) == []
    after = contents(loss=[0.5, 0.75], flagged=["bob"])
    del after["files"]["run"]["adapter_model.safetensors"]
    after["files"]["run"]["clients/ada/adapter_model.safetensors"] = "b"
    assert same_bytes.differences(before, after) == [
        "run/adapter_model.safetensors: missing",
        "run/clients/ada/adapter_model.safetensors: new",
        "run/run.json: flagged: [] -> absent",
        'run/run.json: flagged.0: absent -> "bob"',
        "run/run.json: loss.1: 0.25 -> 0.75",
    ]


def test_runs_that_must_agree_are_held_against_each_other(same_bytes: ModuleType) -> None:
    one, two = {"adapter_model.safetensors": "a", "run.json": "x"}, {"adapter_model.safetensors": "b", "run.json": "y"}
    files = {
        "processes/one": one,
        "processes/two": two,
        "resume/whole": one,
        "resume/resumed": {**one, "run.json": "z"},
    }
    assert same_bytes.unlike_twins(files) == [
        "adapter_model.safetensors: differs between processes/one and processes/two"
    ]


def test_times_and_places_are_removed_at_any_depth(same_bytes: ModuleType) -> None:
    names = same_bytes.REMOVED["run.json"]
    record = {"created": "now", "rounds": [{"seconds": {"training": 1.0}, "round": 1}], "seed": 0}
    assert same_bytes.without(record, names) == {"rounds": [{"round": 1}], "seed": 0}


def test_a_run_that_is_none_is_refused(same_bytes: ModuleType) -> None:
    with pytest.raises(SystemExit, match="--only nothing: is no run and no part"):
        same_bytes.make(["nothing"])
