"""Others' talk at the start: two known messages are left out, all else is told, and a log has no bars in it."""
# SPDX-License-Identifier: Apache-2.0

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import models
import pytest
from transformers.utils import logging as transformers_logging

from fedlora_hf.adapter.base import load_base
from fedlora_hf.config import FederatedConfig
from fedlora_hf.launch.quiet import SILENCED, no_bars_in_logs, silence


@pytest.mark.parametrize("name", SILENCED)
def test_the_known_message_is_left_out_and_others_are_not(name: str, caplog: pytest.LogCaptureFixture) -> None:
    silence()
    logger = logging.getLogger(name)
    assert len(logger.filters) == 1  # the package has done it already when it was imported
    logger.addHandler(caplog.handler)
    try:
        logger.warning(f"{SILENCED[name]} from here: %s", "some reason")
        logger.warning("something is wrong")
    finally:
        logger.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"something is wrong"}


def bars() -> tuple[bool, bool]:
    return transformers_logging.is_progress_bar_enabled(), datasets.utils.is_progress_bar_enabled()


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Bars are on, whatever the environment of the tests says."""
    # The package gives its class under the module's name.
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", None)
    before = bars()
    transformers_logging.enable_progress_bar()
    datasets.utils.enable_progress_bars()
    yield
    if not before[0]:
        transformers_logging.disable_progress_bar()
    if not before[1]:
        datasets.utils.disable_progress_bars()


@pytest.mark.usefixtures("shown")
def test_bars_are_off_in_a_log_and_as_they_were_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    with no_bars_in_logs():
        assert bars() == (False, False)
    assert bars() == (True, True)
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: True))
    with no_bars_in_logs():
        assert bars() == (True, True)


@pytest.mark.usefixtures("shown")
def test_loading_a_base_draws_nothing_into_a_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    models.save_base(tmp_path / "base")
    assert "\r" in capfd.readouterr().err  # saving draws one: they are on
    load_base(FederatedConfig(**models.options(tmp_path, model_name_or_path=str(tmp_path / "base"))), None)
    assert capfd.readouterr() == ("", "")
