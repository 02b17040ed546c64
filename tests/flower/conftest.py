"""A run's configuration and a grid for it, shared by the tests of the Flower bridge."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path
from typing import Any

import models
import pytest
import sample_data
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE = 1


@pytest.fixture
def as_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages can be made here: Flower wants to know for which run and node."""
    for name, value in (("_run_id", 1), ("_task_id", 1), ("_node_id", SERVER_NODE)):
        monkeypatch.setattr(TaskIdentity, name, value)


@pytest.fixture(scope="session")
def flower_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base model, base/, and generated records, dolly.jsonl."""
    folder = tmp_path_factory.mktemp("flower")
    models.save_base(folder / "base")
    sample_data.write_dolly(folder / "dolly.jsonl", 64)
    return folder


@pytest.fixture
def config(flower_inputs: Path, tmp_path: Path) -> dict[str, Any]:
    """The run's configuration: four clients of the same file, two rounds of two steps."""
    return {
        "model_name_or_path": str(flower_inputs / "base"),
        "dataset": str(flower_inputs / "dolly.jsonl"),
        "partition_by": "iid",
        "num_clients": 4,
        "output_dir": str(tmp_path / "flower"),
        "aggregation": "fedavg",
        "num_rounds": 2,
        "local_steps": 2,
        "per_device_train_batch_size": 2,
        "max_length": 48,
        "learning_rate": 1e-2,
        "lora_r": 2,
        "lora_alpha": 4,
        "min_nodes": 4,
        "flags": "--use_cpu --generation_examples 0",
    }
