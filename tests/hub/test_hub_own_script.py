"""A script as TRL's users write it: own data and config, early stopping, curves of every step, resume, push."""
# SPDX-License-Identifier: Apache-2.0

import pytest

pytest.importorskip("tensorboard")


@pytest.fixture(scope="module")
def seen(hub, run_steps):
    return run_steps(hub, "own_script", REPO="alice/own")


def test_it_runs_to_its_end_and_goes_on(seen):
    assert seen["codes"] == [0, 0]
    assert seen["rounds"] == 3
    assert all(seen["tokens"])


def test_every_step_is_a_point_of_a_curve(seen):
    assert seen["points"] == 3 * 3 * 4  # rounds, clients, steps
    clients = {f"train/client/{name}/loss" for name in ("leeds", "london", "york")}
    assert clients | {"train/loss", "train/learning_rate", "train/grad_norm", "eval/global_loss"} <= set(seen["curves"])


def test_metrics_of_its_own_are_in_the_record_and_the_base_too(seen):
    assert 0 <= seen["metrics"]["after"]["global"]["answered"] <= 1
    assert seen["model"]["name_or_path"].endswith("base")
    assert seen["model"]["parameters"] > 0


def test_it_is_on_the_hub(seen):
    assert {"adapter_config.json", "adapter_model.safetensors", "run.json", "README.md"} <= set(seen["files"])
