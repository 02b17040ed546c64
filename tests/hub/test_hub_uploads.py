"""What is shown while a run is sent: a bar of bytes on a terminal, two lines elsewhere, one for a push on the side."""
# SPDX-License-Identifier: Apache-2.0

import re

import pytest


@pytest.fixture(scope="module")
def seen(hub, run_steps):
    return run_steps(hub, "uploads")


def test_off_a_terminal_a_push_is_announced_and_summed_up(seen):
    before, after = seen["plain"]
    assert re.fullmatch(r"uploading to alice/plain: 12 files, \d+\.\d MB", before)
    assert re.fullmatch(r"uploading to alice/plain: done, \d+\.\d MB in \d+\.\d s", after)
    assert seen["one_batch"] == 1


def test_on_a_terminal_files_and_bytes_are_counted_batch_by_batch(seen):
    assert "uploading to alice/terminal 12/12 files" in seen["terminal"]
    assert "done" in seen["terminal"].splitlines()[-1]
    assert seen["batches"] == 3


def test_a_push_in_the_background_says_one_line_when_it_has_arrived(seen):
    assert seen["background"] == f"pushed in the background: Round 1, {seen['url']}\n"
