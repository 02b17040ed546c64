"""The script that compares what two trees make: the same tree makes the same, and every kind of difference is named."""
# SPDX-License-Identifier: Apache-2.0

import copy
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "scripts" / "checks" / "same_bytes.py"


@pytest.fixture
def same_bytes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("same_bytes")


# One process for both actions: importing what a run needs takes longer than the run.
BOTH = """
import sys
from pathlib import Path
import same_bytes
same_bytes.prepare()
file, only = Path(sys.argv[1]), ["--only", "classification"]
assert same_bytes.main(["write", str(file), *only]) == 0
content = same_bytes.load(file)
hashes, records = content["files"]["classification"], content["records"]["classification"]
hashes["adapter_model.safetensors"] = hashes["run.json"] = "0" * 64
records["run.json"]["rounds"][1]["weights"]["client-02"] = 7.0
same_bytes.save(file.with_name("changed.json"), content)
raise SystemExit(same_bytes.main(["compare", str(file.with_name("changed.json")), *only]))
"""


def contents(**record: Any) -> dict[str, Any]:
    """What a FILE holds of one run with an adapter and a record."""
    files = {"adapter_model.safetensors": "a", "run.json": json.dumps(record, sort_keys=True)}
    return {"files": {"run": files}, "records": {"run": {"run.json": record}}}


def test_the_same_tree_makes_the_same_but_for_what_was_changed_by_hand(same_bytes: ModuleType, tmp_path: Path) -> None:
    command, paths = [sys.executable, "-c", BOTH, str(tmp_path / "before.json")], [str(SCRIPT.parent), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 1, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("classification/")]
    assert lines[0] == "classification/adapter_model.safetensors: other bytes"
    assert lines[1].startswith("classification/run.json: rounds.1.weights.client-02: 7.0 -> 0.")
    assert len(lines) == 2
    content = same_bytes.load(tmp_path / "before.json")
    assert list(content["files"]) == ["classification"]
    hashes, record = content["files"]["classification"], content["records"]["classification"]["run.json"]
    assert {"adapter_config.json", "adapter_model.safetensors", "run.json", "rounds/2/run.json"} <= set(hashes)
    # Something was trained: the two rounds left different adapters.
    assert hashes["rounds/1/adapter_model.safetensors"] != hashes["rounds/2/adapter_model.safetensors"]
    assert not {"created", "versions", "command"} & set(record)


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
