"""Pushes and downloads over a Hub that fails: every fault is survived, or told, and nothing shows half-done."""
# SPDX-License-Identifier: Apache-2.0

import pytest


@pytest.fixture(scope="module")
def seen(hub, run_steps):
    return run_steps(hub, "faults")


@pytest.mark.parametrize(
    "fault",
    [
        "500 on commit",
        "conflict",
        "hang up on commit",
        "answer lost",
        "slow commit",
        "hang up on upload",
        "500 on create",
        "500 on validation",
        "429 on listing",
    ],
)
def test_a_push_survives_with_exactly_one_commit(seen, fault):
    assert seen[fault] == [1, True]


def test_a_commit_that_came_in_between_is_kept_below_ours(seen):
    titles, ours, theirs = seen["both"]
    assert titles == ["ours", "theirs"]
    assert theirs
    assert ours, "a background push holds the folder as it was when it was submitted"


def test_background_pushes_skip_while_one_is_under_way(seen):
    assert seen["skipped"] == [True, False]
    assert seen["finished"] is True


def test_a_failed_background_push_is_reported_and_does_not_raise(seen):
    address, warning = seen["background_failure"]
    assert address is None
    assert warning.startswith("push in the background failed: alice/visible: is a public repository")
    assert seen["threads"] == []


def test_an_interrupted_upload_shows_nothing_and_is_resumed(seen):
    assert seen["died"].startswith("ConfigError: alice/resumed: ")
    assert "\n" not in seen["died"]
    assert seen["untouched"] is True
    first, second, commits = seen["uploads"]
    assert commits == 1
    assert first + second < 2 * max(first, second), "blobs that had arrived must not be sent again"


def test_a_broken_download_is_resumed(seen):
    assert seen["resumed"] is True


def test_no_network_is_one_line(seen):
    fetch, push = seen["unreachable"]
    assert fetch.startswith("AdapterError: alice/big@main: the Hub cannot be reached")
    assert push.startswith("ConfigError: alice/faults: the Hub cannot be reached")
