"""Options: their defaults are as documented, and a value that cannot be used is refused in one line."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path
from typing import Any

import models
import pytest

from fedlora_hf import FederatedConfig
from fedlora_hf.errors import ConfigError


def config(**changes: Any) -> FederatedConfig:
    return FederatedConfig(output_dir="unused", use_cpu=True, **changes)


def test_defaults_that_differ_from_training_arguments() -> None:
    args = config()
    assert (args.learning_rate, str(args.lr_scheduler_type.value)) == (2e-4, "constant")
    assert args.remove_unused_columns is False
    assert args.average_tokens_across_devices is False
    assert args.aggregation == "clair"
    assert args.aggregation_options == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_rounds": -1}, "num_rounds=-1: must be at least 0"),
        ({"clients_per_round": 0}, "clients_per_round=0: must be at least 1; leave it out for all clients"),
        ({"local_steps": 0}, "local_steps=0: must be at least 1"),
        ({"local_epochs": 0.0}, "local_epochs=0.0: must be above 0; pass local_steps or local_epochs"),
        ({"lora_r": 0}, "lora_r=0: must be at least 1"),
        ({"max_length": 7}, "max_length=7: must be at least 8"),
        ({"fedprox_mu": -0.5}, "fedprox_mu=-0.5: must be at least 0"),
        ({"fedprox_mu": float("nan")}, "fedprox_mu=nan: must be at least 0"),
        ({"server_min_clients": 0}, "server_min_clients=0: must be at least 1"),
        ({"keep_rounds": 1}, "keep_rounds=1: must be 0 (all) or at least 2"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0: must be in [0, 1)"),
        ({"test_fraction": -0.1}, "test_fraction=-0.1: must be in [0, 1)"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "= 1.0: must stay below 1"),
        ({"dataset": "d", "partition_by": "iid"}, "partition_by=iid without num_clients"),
        ({"aggregation": "fed_avg"}, "aggregation method 'fed_avg': must be one of clair, local, fedavg"),
        ({"aggregation_options": "{rank: 2}"}, "aggregation_options='{rank: 2}': must be a JSON object"),
        ({"aggregation_options": "[1]"}, "must be a JSON object"),
        ({"aggregation_options": {"speed": 3}}, "option 'speed' of method 'clair'"),
        ({"aggregation": "fedavg", "aggregation_options": '{"rank": 2}'}, "its options are: none; remove it"),
        ({"aggregation": "trimmed_mean", "aggregation_options": {"trim": "much"}}, "trim='much': must be of type"),
    ],
)
def test_refusals_are_one_line_with_value_rule_and_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert message in str(caught.value)
    assert ";" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_come_as_json_or_as_a_mapping() -> None:
    for given in ('{"trim": 0.25}', {"trim": 0.25}):
        args = config(aggregation="trimmed_mean", aggregation_options=given)
        assert args.aggregation_options == {"trim": 0.25}
    assert config(aggregation_options="").aggregation_options == {}


def test_target_modules_may_be_one_word_with_commas() -> None:
    assert config(target_modules=["q_proj, v_proj"]).target_modules == ["q_proj", "v_proj"]
    assert config(target_modules=["q_proj", "v_proj"]).target_modules == ["q_proj", "v_proj"]


def test_the_record_hears_of_the_federations_options_and_not_of_places(tmp_path: Path) -> None:
    told = FederatedConfig(**models.options(tmp_path)).changed()
    assert told["local_steps"] == 2
    assert told["learning_rate"] == 1e-2
    assert told["aggregation"] == "fedavg"
    assert "output_dir" not in told
    assert "hub_token" not in told
    assert None not in told.values()


def test_checkpointing_has_one_meaning_under_its_old_and_its_new_name() -> None:
    """And no deprecation warning: warnings are errors here."""
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        for value in (True, False):
            args = config(**{name: value})
            assert args.activation_checkpointing is args.gradient_checkpointing is value
    assert config().activation_checkpointing is False
