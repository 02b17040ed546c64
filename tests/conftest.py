"""What every test may lean on: a quiet, offline, single-threaded environment; the real data where it stands beside."""
# SPDX-License-Identifier: Apache-2.0

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path

import pytest

# Files of a minute or so each: they go first, so that no worker is left alone with one at the end.
SLOW_FILES = (
    "test_flower_simulation.py",
    "test_hub_own_script.py",
    "test_judging.py",
    "test_same_bytes.py",
    "test_report.py",
    "test_hostile_records.py",
    "test_notebook.py",
    "test_trainers_shelf.py",
    "test_trainer_processes.py",
    "test_chaos.py",
)
REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first; every other test where it was. It takes pytest-xdist's --no-loadscope-reorder to stay so."""
    order = {name: place for place, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of published datasets (dolly/, natural_instructions/), or a skip that says where it was looked for."""
    if not (REAL_DATA / "dolly").is_dir():
        pytest.skip("no published datasets in ../shared/data beside the project")
    return REAL_DATA


@pytest.fixture
def bare_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that write no figures and wait for no disk: neither moves a number, and both take most of a tiny run."""
    monkeypatch.setattr("fedlora_hf.rounds.output.write_report", lambda record, folder: [])
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny causal LM and its tokenizer."""
    import models

    return models.save_base(tmp_path_factory.mktemp("base"))
