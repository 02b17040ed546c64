"""Options: their defaults are as documented, and a value that cannot be used is refused in one line."""
# SPDX-License-Identifier: Apache-2.0

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import models
import pytest
from transformers import HfArgumentParser, TrainingArguments

from fedlora_hf import FederatedConfig
from fedlora_hf.config import ALWAYS_TOLD, SERVER_SIDE, may_change
from fedlora_hf.errors import ConfigError
from fedlora_hf.options import GROUPS
from fedlora_hf.options.facts import facts_of
from fedlora_hf.record.record import plain


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
        ({"local_epochs": 0.0}, "local_epochs=0.0: must be a finite number above 0; num_rounds=0 trains nothing"),
        ({"lora_r": 0}, "lora_r=0: must be at least 1"),
        ({"max_length": 7}, "max_length=7: must be at least 8"),
        ({"fedprox_mu": -0.5}, "fedprox_mu=-0.5: must be a finite number, 0 or above"),
        ({"fedprox_mu": float("nan")}, "fedprox_mu=nan: must be a finite number, 0 or above"),
        ({"server_min_clients": 0}, "server_min_clients=0: must be at least 1"),
        ({"keep_rounds": 1}, "keep_rounds=1: must be 0 (all) or at least 2"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0: must be in [0, 1)"),
        ({"test_fraction": -0.1}, "test_fraction=-0.1: must be in [0, 1)"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "= 1.0: must stay below 1"),
        ({"dataset": "d", "partition_by": "iid"}, "partition_by=iid without num_clients"),
        ({"aggregation": "fed_avg"}, "aggregation method 'fed_avg': must be one of clair, local, fedavg"),
        (
            {"aggregation_options": "{rank: 2}"},
            "aggregation_options='{rank: 2}': must be NAME=VALUE ..., or one JSON object",
        ),
        ({"aggregation_options": "[1]"}, "or one JSON object"),
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"functional_judges": 2, "aggregation": "fedavg"},
            "with aggregation clair only; pass --aggregation clair",
        ),
        ({"global_rounds": 3}, "global_rounds=3: has an effect with pipeline fedlora_optimizer only"),
        ({"global_learning_rate": 0.1}, "an effect with pipeline fedlora_optimizer only"),
        (
            {"global_learning_rate": 0.1, "pipeline": "fedlora_optimizer", "global_rounds": 0},
            "has no effect without global_rounds; pass --global_rounds",
        ),
        (
            {"server_dataset": "d.jsonl"},
            "server_dataset='d.jsonl': only the global stage of a pipeline and fltrust",
        ),
        ({"personal_learning_rate": 0.1}, "has no effect without personal_steps; pass --personal_steps"),
        ({"dirichlet_alpha": 2.0}, "dirichlet_alpha=2.0: has an effect with partition_by dirichlet only"),
        ({"dirichlet_alpha": 0.0}, "dirichlet_alpha=0.0: must be a finite number above 0"),
        ({"num_clients": 3}, "num_clients=3: has an effect with partition_by iid or dirichlet only"),
        (
            {"client_column": "site", "partition_by": "category"},
            "client_column=site: has an effect with partition_by client only",
        ),
        ({"labels": ["a,b"]}, "labels=a,b: has an effect with task sequence_classification only"),
        ({"local_steps": 3, "local_epochs": 2.0}, "local_epochs=2.0: has no effect beside local_steps"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type=fp4: has no effect without load_in_4bit"),
        ({"use_bnb_nested_quant": True}, "use_bnb_nested_quant=True: has no effect without load_in_4bit"),
        (
            {"max_new_tokens": 9, "generation_examples": 0},
            "max_new_tokens=9: has no effect without",
        ),
        (
            {"generation_examples": 9, "task": "sequence_classification"},
            "generation_examples=9: has an effect with task causal_lm only",
        ),
        ({"max_eval_examples": 0}, "max_eval_examples=0: must be at least 1"),
        ({"weight_by": "uniform", "aggregation": "median"}, "weight_by=uniform: has no effect with median"),
    ],
)
def test_an_option_without_effect_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert message in str(caught.value)
    assert "leave" in str(caught.value) or "must be" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_option_that_switches_nothing_on_is_not_refused() -> None:
    config(generation_examples=0, task="sequence_classification")
    config(global_rounds=0, functional_judges=0, aggregation="fedavg", use_bnb_nested_quant=False)
    config(dirichlet_alpha=0.5, num_clients=None)


def test_every_fact_names_an_option_there_is() -> None:
    names = {item.name for item in fields(FederatedConfig)}
    borrowed = {item.name for item in fields(TrainingArguments)}
    told = [facts for group in GROUPS for item in fields(group) if (facts := facts_of(item)) is not None]
    assert len(told) == sum(len(fields(group)) for group in GROUPS)
    assert {other for facts in told for other in facts.needs} <= names
    assert names >= SERVER_SIDE
    assert borrowed >= ALWAYS_TOLD


def test_upstreams_own_parser_reads_the_options(tmp_path: Path) -> None:
    """The facts beside the help are no argument of argparse's."""
    (args,) = HfArgumentParser(FederatedConfig).parse_args_into_dataclasses(["--num_rounds", "4", "--use_cpu"])
    assert args.num_rounds == 4


def test_every_value_of_training_arguments_that_is_set_is_told(tmp_path: Path) -> None:
    told = config(
        adam_beta1=0.8,
        warmup_steps=2,
        lr_scheduler_type="linear",
        hub_token="secret",
        report_to="none",
        logging_steps=7,
    ).changed()
    assert (told["adam_beta1"], told["warmup_steps"], told["logging_steps"]) == (0.8, 2, 7)
    assert not {"hub_token", "output_dir", "adam_beta2", "seed"} & set(told)
    assert "secret" not in str(told)
    assert config(gradient_checkpointing=True).changed()["activation_checkpointing"] is True
    json.dumps(plain(config(fsdp="", optim="sgd", lr_scheduler_type="cosine").changed()))


@pytest.mark.parametrize("name", ["adam_beta1", "warmup_steps", "learning_rate", "lora_r", "dataset", "data_seed"])
def test_what_moves_the_adapters_may_not_change_on_resuming(name: str) -> None:
    assert not may_change(name)


@pytest.mark.parametrize(
    "name",
    ["hub_license", "hub_language", "hub_with_clients", "hub_model_id", "logging_steps", "report_to", "num_rounds"],
)
def test_what_moves_no_number_may_change_on_resuming(name: str) -> None:
    assert may_change(name)


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


@pytest.mark.parametrize(("given", "kept"), [("auto", "auto"), (None, "auto"), ("5", 5), (5, 5), (0, 0), ("0", 0)])
def test_judges_are_a_number_or_auto(given: Any, kept: Any) -> None:
    assert config(functional_judges=given, aggregation="clair").functional_judges == kept


@pytest.mark.parametrize("given", ["some", "-1", -1, 1.5, "1.5", True, False])
def test_judges_of_another_kind_are_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match="must be auto or a whole number of clients, 0 or more; 0 judges on"):
        config(functional_judges=given, aggregation="clair")


def test_losses_are_looked_at_where_clair_is_told_of_them_and_no_noise_must_cover() -> None:
    assert config(aggregation="clair").judged
    assert not config(aggregation="fedavg").judged
    assert not config(aggregation="clair", functional_judges=0).judged
    assert not config(aggregation="clair", dp_clip=1.0).judged
