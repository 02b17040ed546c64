"""Tokens given on the command line are in no record."""
# SPDX-License-Identifier: Apache-2.0

import sys

import pytest
from models import federation

from fedlora_hf.util.redaction import redacted

TOKEN = "hf_" + "s" * 34


@pytest.mark.parametrize("flag", [["--hub_token", TOKEN], [f"--hub_token={TOKEN}"], ["--note", f"see {TOKEN}"]])
def test_a_command_is_recorded_without_its_token(tmp_path, monkeypatch, flag):
    monkeypatch.setattr(sys, "argv", ["fedlora", "train", *flag, "--max_new_tokens", "8"])
    record = federation(tmp_path, hub_token=TOKEN).run.record
    assert record.command[-2:] == ["--max_new_tokens", "8"]
    assert TOKEN not in record.to_json()
    assert redacted(record.command) == record.command
