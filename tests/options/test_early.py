"""Flags that cannot be right are told at once, before torch is there; other people's names are understood."""
# SPDX-License-Identifier: Apache-2.0

import subprocess
import sys
from pathlib import Path

import models
import pytest

from fedlora_hf import FederatedConfig
from fedlora_hf.errors import ConfigError
from fedlora_hf.flags import parse
from fedlora_hf.options.arguments import ARGUMENTS
from fedlora_hf.options.early import KNOWN, OWN, checked
from fedlora_hf.options.spelling import ALIASES, HINTS, suggestion


def test_aliases_and_hints_are_of_names_that_there_are_not() -> None:
    assert not (set(ALIASES) | set(HINTS)) & (set(OWN) | set(ARGUMENTS))
    assert set(ALIASES.values()) <= KNOWN


@pytest.mark.parametrize(
    ("given", "understood"),
    [
        (["--dataset_name", "d.jsonl"], ["--dataset", "d.jsonl"]),
        (["--dtype=float32"], ["--model_dtype=float32"]),
        (["--lora_target_modules", "q_proj", "v_proj"], ["--target_modules", "q_proj", "v_proj"]),
        (["--num-rounds", "3"], ["--num_rounds", "3"]),
        (["--num_rou", "3"], ["--num_rou", "3"]),
        (["--no_dataloader_pin_memory"], ["--no_dataloader_pin_memory"]),
        (["--local_rank", "-1"], ["--local_rank", "-1"]),
    ],
)
def test_names_are_ours_afterwards(given: list[str], understood: list[str]) -> None:
    assert checked(given) == understood


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--num_epochs", "3"], "--num_epochs is no flag of fedlora train; say --local_epochs"),
        (["--agregation", "fedavg"], "did you mean aggregation"),
        (["--partition_by", "clients"], "partition_by=clients: must be one of .*; did you mean client"),
        (["--num_rounds", "many"], "num_rounds=many: must be a whole number"),
        (["--num_rounds=-1"], "num_rounds=-1: must be at least 0"),
        (["--zzz"], "--zzz is no flag of fedlora train; see fedlora train --help"),
    ],
)
def test_what_cannot_be_right_is_one_line(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        checked(given)
    assert "\n" not in str(caught.value)


def test_a_wrong_flag_is_told_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom fedlora_hf.cli import main\n"
        "code = main(['train', '--datasett', 'x'])\n"
        "sys.exit(code if not {'torch', 'transformers'} & set(sys.modules) else 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "fedlora: error: --datasett is no flag of fedlora train; did you mean dataset?; see fedlora train --help"
    )


def test_a_yaml_file_may_use_them_too(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"dataset_name: d.jsonl\ndtype: float32\noutput_dir: {tmp_path}\nuse_cpu: true\n")
    args = parse(["--config", str(file)])
    assert (args.dataset, args.model_dtype) == ("d.jsonl", "float32")
    file.write_text("num_epochs: 3\n")
    with pytest.raises(ConfigError, match="'num_epochs' is no flag of fedlora train; say --local_epochs"):
        parse(["--config", str(file)])


def test_python_says_what_was_meant(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dataset_name: is no option; say dataset"):
        FederatedConfig(**models.options(tmp_path), dataset_name="x")
    with pytest.raises(ConfigError, match="num_round: is no option; did you mean num_rounds"):
        FederatedConfig(output_dir=str(tmp_path), num_round=3)  # type: ignore[call-arg]


def test_a_key_that_only_a_flower_run_has_is_said_to_be_one() -> None:
    assert suggestion("wire_dtype", {"model_dtype"}).startswith("nothing travels here; it is a key of a Flower run")
