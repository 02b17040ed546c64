"""A base model sharded by DeepSpeed's ZeRO 3 while its adapters stay whole; launches that cannot be followed."""
# SPDX-License-Identifier: Apache-2.0

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import models
import pytest
from accelerate.utils import DistributedType
from launched import assert_same_adapters, launch

from fedlora_hf.config import FederatedConfig
from fedlora_hf.errors import ConfigError
from fedlora_hf.launch.zero import zero_settings

SIZES = {"ada": 5, "bob": 9, "eve": 2}
# By default DeepSpeed gathers nothing anew that is as small as these models.
ZERO = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
RUNS: dict[str, dict[str, Any]] = {
    "by_launch": {"evaluate_rounds": True, "personal_steps": 1, "gradient_checkpointing": True},
    "dirmag": {"pipeline": "fedlora_optimizer", "personal_steps": 1, "local_steps": None, "deepspeed": ZERO},
    "classes": {"aggregation": "stacking", "task": "sequence_classification", "deepspeed": ZERO},
    "bfloat16": {"bf16": True, "num_rounds": 1, "deepspeed": ZERO},
}
SCRIPT = """
import os, sys
os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
import models, test_zero, torch
import fedlora_hf.rounds.output

fedlora_hf.rounds.output.write_report = lambda record, folder: []
os.fsync = lambda handle: None
ids = torch.arange(2, 34).reshape(4, 8)
plain = models.tiny_llama().generate(input_ids=ids, max_new_tokens=5, do_sample=False)
for name, options in test_zero.RUNS.items():
    model, clients = test_zero.federation_of(options)
    trainer = models.federation(f"{sys.argv[1]}/{name}", clients, model=model, client_parallel="data", **options)
    named = dict(trainer.model.named_parameters())
    assert {n for n, p in named.items() if hasattr(p, "ds_id")} == {n for n, p in named.items() if not p.numel()}
    assert {n for n, p in named.items() if p.numel()} == {n for n in named if ".default." in n}
    if "task" not in options:
        trainer.model.eval()
        assert torch.equal(trainer.model.generate(input_ids=ids, max_new_tokens=5, do_sample=False), plain)
    trainer.train()
"""


def federation_of(options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model and the clients of one of the runs."""
    if "task" in options:
        return models.tiny_classifier(), models.token_clients(SIZES, models.class_examples, held_out=3)
    return models.tiny_llama(), models.token_clients(SIZES, held_out=3)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    folder = tmp_path_factory.mktemp("sharded")
    launch(SCRIPT, folder, 2, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_sharded_base_trains_the_adapters_of_a_whole_one(
    name: str, sharded: Path, tmp_path: Path, bare_output: None
) -> None:
    """Parts of the adapter change from stage to stage, a carried adapter joins, a head is trained whole."""
    model, clients = federation_of(RUNS[name])
    options = {key: value for key, value in RUNS[name].items() if key != "deepspeed"}
    models.federation(tmp_path, clients, model=model, gradient_accumulation_steps=2, **options).train()
    # DeepSpeed multiplies matrices in an order of its own, and Adam divides by what is close to zero.
    assert_same_adapters(tmp_path, sharded / name, atol=1e-5)


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FederatedConfig:
    """Options, as if DeepSpeed were installed and this were the only process of a launch."""
    args = FederatedConfig(**models.options(tmp_path))
    monkeypatch.setattr("fedlora_hf.launch.zero.find_spec", lambda name: object())
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    return args


def settings(args: FederatedConfig, **said: Any) -> dict[str, Any] | None:
    args.deepspeed = {**said, "zero_optimization": {"stage": 3, **said.get("zero_optimization", {})}}
    return zero_settings(args)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"optimizer": {"type": "AdamW"}}, "optimizer: --optim says otherwise"),
        ({"bf16": {"enabled": True}}, "bf16: --bf16 says"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps: --gradient_accumulation_steps says"),
        ({"train_batch_size": 2}, "train_batch_size: --per_device_train_batch_size says"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer: cpu"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "offload_param: nvme is not .* none or cpu"),
    ],
)
def test_configurations_that_cannot_be_followed(said: dict[str, Any], told: str, launched: FederatedConfig) -> None:
    with pytest.raises(ConfigError, match=told):
        settings(launched, **said)


def test_what_agrees_or_says_nothing_is_taken(launched: FederatedConfig) -> None:
    agreed = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": False}, "gradient_clipping": 1.0}
    zero = {"offload_param": {"device": "cpu"}, "stage3_prefetch_bucket_size": "auto"}
    found = settings(launched, zero_optimization=zero, **agreed, train_batch_size=4)
    assert found is not None
    assert (found["stage"], found["offload_param"]["device"]) == (3, "cpu")
    assert "stage3_prefetch_bucket_size" not in found


def test_nothing_to_run_it_with(monkeypatch: pytest.MonkeyPatch, launched: FederatedConfig) -> None:
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ConfigError, match=r"DeepSpeed without a launcher: .* accelerate launch"):
        settings(launched)
    monkeypatch.setattr("fedlora_hf.launch.zero.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"DeepSpeed: is not installed; pip install 'fedlora_hf\[deepspeed\]'"):
        settings(launched)
    launched.deepspeed = "missing.json"
    with pytest.raises(ConfigError, match=r"DeepSpeed: .*missing\.json"):
        zero_settings(launched)


def test_lower_stages_are_plain_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As the launch says it: accelerate and transformers see no DeepSpeed, and the environment stays as it was."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    trainer = models.federation(tmp_path)
    assert trainer.args.zero is None
    assert "ZeRO stage 2: shards nothing of the frozen base" in caplog.text
    assert trainer.accelerator.distributed_type == DistributedType.NO
    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "true"
