"""Progress: bars on a terminal, plain lines elsewhere, and nothing at all when disabled."""
# SPDX-License-Identifier: Apache-2.0

import io
import re

import pytest
from rich.console import Console

from fedlora_hf.util import progress
from fedlora_hf.util.progress import Progress


def steps(terminal: bool, enabled: bool = True) -> tuple[Progress, io.StringIO]:
    shown = io.StringIO()
    return Progress(enabled, Console(file=shown, force_terminal=terminal, width=100, color_system=None)), shown


def send(to: Progress) -> None:
    with to.transfer("uploading to a/b", 3, 6_000_000) as arrived:
        arrived(2, 2_000_000)
        arrived(1, 4_000_000)


def test_a_transfer_off_a_terminal_is_a_line_before_and_a_line_after() -> None:
    to, shown = steps(terminal=False)
    send(to)
    before, after = shown.getvalue().splitlines()
    assert before == "uploading to a/b: 3 files, 6.0 MB"
    assert re.fullmatch(r"uploading to a/b: done, 6.0 MB in \d+\.\d s", after)


def test_a_long_transfer_speaks_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    to, shown = steps(terminal=False)
    send(to)
    assert shown.getvalue().splitlines()[1] == "uploading to a/b: 2 of 3 files, 2.0 MB of 6.0 MB"
    assert len(shown.getvalue().splitlines()) == 3


def test_a_transfer_on_a_terminal_is_a_bar_of_bytes_that_goes_away() -> None:
    to, shown = steps(terminal=True)
    send(to)
    assert "uploading to a/b 3/3 files" in shown.getvalue()
    assert "6.0/6.0 MB" in shown.getvalue()
    assert shown.getvalue().count("done, 6.0 MB") == 1
    assert shown.getvalue().endswith(" s\n")


def test_a_failed_transfer_does_not_claim_to_be_done() -> None:
    to, shown = steps(terminal=False)
    with pytest.raises(OSError, match="gone"), to.transfer("uploading", 1, 1):
        raise OSError("gone")
    assert "done" not in shown.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_disabled_is_silent_and_loses_no_item(terminal: bool) -> None:
    to, shown = steps(terminal, enabled=False)
    send(to)
    to.say("x")
    assert list(to.over(["a", "b"], "clients")) == ["a", "b"]
    assert shown.getvalue() == ""


def test_items_are_named_on_a_terminal_and_passed_on_silently_elsewhere() -> None:
    to, shown = steps(terminal=True)
    assert list(to.over(["ann", "ben"], "round 1/3")) == ["ann", "ben"]
    assert "round 1/3 ben" in shown.getvalue()
    to, shown = steps(terminal=False)
    assert list(to.over(["ann", "ben"], "round 1/3")) == ["ann", "ben"]
    assert shown.getvalue() == ""


def test_a_line_stays_one_line_however_long() -> None:
    shown = io.StringIO()
    Progress(console=Console(file=shown, width=40)).say("round 1/4: 12 clients, flagged " + ", ".join(["client"] * 30))
    assert len(shown.getvalue().splitlines()) == 1
