"""A FederatedTrainer with push_to_hub: rounds arrive as they end, and a run goes on from one of them."""
# SPDX-License-Identifier: Apache-2.0

import pytest


@pytest.fixture(scope="module")
def seen(hub, run_steps):
    return run_steps(hub, "training", REPO="alice/federation")


def test_rounds_are_pushed_as_they_end_and_tagged(seen):
    assert seen["tags"] == ["round-1", "round-2", "round-3"]
    assert "/alice/federation/commit/" in seen["url"]


def test_the_repository_is_private_and_holds_no_client_unless_asked(seen):
    assert seen["private"] is True
    assert {"adapter_config.json", "adapter_model.safetensors", "run.json", "README.md"} <= set(seen["files"])
    assert not [name for name in seen["files"] if name.startswith(("clients/", "rounds/"))]


def test_a_run_resumed_from_a_pushed_round_ends_in_the_same_adapter_to_the_bit(seen):
    assert seen["rounds_trained_after_resuming"] == 2
    assert seen["same"]


def test_personal_adapters_on_the_hub_are_aggregated_by_name(seen):
    names = [f"alice-federation-whole-clients-{client}" for client in ("ada", "bob", "eve")]
    assert seen["joined"] == [0, names]


def test_a_direction_magnitude_adapter_is_one_again_when_read_from_the_hub(seen):
    assert seen["direction_magnitude"] == ["A.direction", "A.magnitude", "B.direction", "B.magnitude"]
