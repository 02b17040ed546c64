"""`report_to`: a run's numbers reach TensorBoard and trackio, round by round, without a network."""
# SPDX-License-Identifier: Apache-2.0

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sample_data

ROUND = {"loss", "round", "flagged", "quarantined", "seconds"}


@pytest.fixture(scope="module")
def tracked(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two rounds that reported to both, in a process of its own: trackers keep global state."""
    pytest.importorskip("trackio")
    folder = tmp_path_factory.mktemp("tracked")
    data = sample_data.write_dolly(folder / "dolly.jsonl", 40)
    flags = {"model_name_or_path": base_model, "dataset": data, "output_dir": folder / "out", "num_rounds": 2}
    flags |= {"local_steps": 1, "lora_r": 2, "generation_examples": 0, "max_length": 64, "use_cpu": True}
    flags |= {"partition_by": "iid", "num_clients": 3, "project": "federation", "run_name": "first", "seed": 3}
    command = [sys.executable, "-m", "fedlora_hf", "train", *(f"--{name}={value}" for name, value in flags.items())]
    command += ["--disable_tqdm", "--evaluate_rounds", "--report_to", "tensorboard", "trackio"]
    done = subprocess.run(command, env=environment(folder), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "TRACKIO_DIR": str(folder / "trackio"), "HF_HUB_OFFLINE": "1"}


def record(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "out" / "run.json").read_text()))


def losses(folder: Path) -> list[float]:
    """Mean training loss of each round, as the record has it."""
    rounds = [list(entry["train_loss"].values()) for entry in record(folder)["rounds"]]
    return [sum(values) / len(values) for values in rounds]


def test_tensorboard_has_the_numbers_of_every_round(tracked: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (events,) = (tracked / "out").glob("runs/*/events*")
    log = event_accumulator.EventAccumulator(str(events.parent)).Reload()
    tags = set(log.Tags()["scalars"])
    assert {f"train/{name}" for name in ROUND} | {"eval/global_loss", "eval/personalised_loss"} <= tags
    assert [point.value for point in log.Scalars("train/loss")] == pytest.approx(losses(tracked), rel=1e-5)
    after = record(tracked)["metrics"]["after"]["global"]["loss"]
    assert log.Scalars("eval/global_loss")[-1].value == pytest.approx(after, rel=1e-5)


def test_trackio_has_the_numbers_of_every_round(tracked: Path) -> None:
    after = record(tracked)["metrics"]["after"]["global"]["loss"]
    # Under the names that TensorBoard has; the last of the evaluations is that of the finished adapter.
    for metric, expected in (("train/loss", losses(tracked)), ("train/round", [1, 2]), ("eval/global_loss", [after])):
        command = [sys.executable, "-m", "trackio.cli", "get", "metric", "--project", "federation"]
        command += ["--run", "first", "--metric", metric, "--json"]
        done = subprocess.run(command, env=environment(tracked), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        points = json.loads(done.stdout)["values"]
        assert [point["value"] for point in points][-len(expected) :] == pytest.approx(expected)


def test_both_have_the_same_names(tracked: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (events,) = (tracked / "out").glob("runs/*/events*")
    tags = set(event_accumulator.EventAccumulator(str(events.parent)).Reload().Tags()["scalars"])
    command = [sys.executable, "-m", "trackio.cli", "list", "metrics", "--project", "federation", "--run", "first"]
    done = subprocess.run(
        [*command, "--json"], env=environment(tracked), capture_output=True, text=True, timeout=120, check=True
    )
    names = set(json.loads(done.stdout)["metrics"])
    # What Trainer's own callback for trackio adds, and nothing of ours.
    assert names - tags <= {"train/global_step"}
    assert tags <= names
