"""A base model sharded by FSDP 2 while its adapters stay whole; launches that cannot be followed are refused."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from launched import assert_same_adapters, launch

from fedlora_hf.adapter.slot import AdapterSlot, peft_config, with_adapter
from fedlora_hf.config import FederatedConfig
from fedlora_hf.errors import ConfigError
from fedlora_hf.training.sharding import prepared

SIZES = {"ada": 5, "bob": 9, "eve": 2}
RUNS: dict[str, dict[str, Any]] = {
    "lora": {"evaluate_rounds": True, "personal_steps": 1, "gradient_checkpointing": True},
    "dirmag": {"pipeline": "fedlora_optimizer", "personal_steps": 1, "local_steps": None},
    "stacking": {"aggregation": "stacking"},
}
# accelerate shards on GPUs only. Its own plugin and its own `prepare` are made to believe that gloo on a CPU is one.
SCRIPT = f"""
import os, sys
import models, torch
import fedlora_hf.rounds.output
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import Trainer

create = Trainer.create_accelerator_and_postprocess

def sharded(self):
    create(self)
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=False, auto_wrap_policy="TRANSFORMER_BASED_WRAP"
    )
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    self.is_fsdp_enabled = True

Trainer.create_accelerator_and_postprocess = sharded
fedlora_hf.rounds.output.write_report = lambda record, folder: []
os.fsync = lambda handle: None
clients = models.token_clients({SIZES}, held_out=3)
ids = torch.arange(2, 34).reshape(4, 8)
plain = models.tiny_llama().generate(input_ids=ids, max_new_tokens=5, do_sample=False)
for name, options in {RUNS}.items():
    trainer = models.federation(f"{{sys.argv[1]}}/{{name}}", clients, client_parallel="data", **options)
    base = {{n for n, p in trainer.model.named_parameters() if ".lora_" not in n}}
    assert base == {{n for n, p in trainer.model.named_parameters() if isinstance(p, DTensor)}}
    trainer.model.eval()
    assert torch.equal(trainer.model.generate(input_ids=ids, max_new_tokens=5, do_sample=False), plain)
    trainer.train()
"""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    launch(SCRIPT, folder, 2, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_sharded_base_trains_the_adapters_of_a_whole_one(
    name: str, sharded: Path, tmp_path: Path, bare_output: None
) -> None:
    """Parts of the adapter change from stage to stage, and a carried adapter joins the sharded model (stacking)."""
    clients = models.token_clients(SIZES, held_out=3)
    models.federation(tmp_path, clients, gradient_accumulation_steps=2, **RUNS[name]).train()
    assert_same_adapters(tmp_path, sharded / name, atol=1e-6)


@pytest.mark.parametrize(
    ("plugin", "zero", "together", "told"),
    [
        ({}, None, False, "FSDP with client_parallel=clients"),
        (None, {"stage": 3}, False, "DeepSpeed with client_parallel=clients"),
        ({"fsdp_version": 1}, None, True, "fsdp_version=1"),
        ({"cpu_ram_efficient_loading": True}, None, True, "cpu_ram_efficient_loading=true"),
    ],
)
def test_launches_that_cannot_be_followed(
    plugin: dict[str, Any] | None, zero: dict[str, Any] | None, together: bool, told: str, tmp_path: Path
) -> None:
    whole = {"fsdp_version": 2, "cpu_ram_efficient_loading": False}
    given = None if plugin is None else SimpleNamespace(**{**whole, **plugin})
    accelerator: Any = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=given))
    with pytest.raises(ConfigError, match=told):
        prepared(accelerator, slot(tmp_path), together, zero)


def test_two_processes_on_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    plugin = SimpleNamespace(fsdp_version=2, cpu_ram_efficient_loading=False)
    accelerator: Any = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), device=torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"FSDP with 2 processes on 1 GPU: .* one process for each GPU"):
        prepared(accelerator, slot(tmp_path), True, None)


def test_fsdp_where_accelerate_would_ignore_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="FSDP on 1 x cpu"):
        models.federation(tmp_path, client_parallel="data")


def slot(folder: Path) -> AdapterSlot:
    return AdapterSlot(with_adapter(models.tiny_llama(), peft_config(FederatedConfig(**models.options(folder))), 0))
