"""The table of TrainingArguments: total, honest in its error messages, and the page that is made from it."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
from pathlib import Path
from typing import Any

import models
import pytest
from transformers import TrainingArguments

from fedlora_hf import FederatedConfig
from fedlora_hf.errors import ConfigError
from fedlora_hf.options.arguments import ARGUMENTS, NOT_IN_ALL, check_arguments, with_table
from fedlora_hf.options.needs import NEEDS

PAGE = Path(__file__).parents[2] / "docs" / "trainer.md"
FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments)}
CHECKPOINTING = "activation_checkpointing_kwargs"
if CHECKPOINTING not in FIELDS:  # transformers 5.17 has the older name alone
    CHECKPOINTING = "gradient_checkpointing_kwargs"


def config(folder: Path, **changes: Any) -> FederatedConfig:
    return FederatedConfig(**models.options(folder, **changes))


def test_every_field_of_training_arguments_is_in_the_table() -> None:
    assert set(FIELDS) - set(ARGUMENTS) == set(), "transformers has new fields: say in the table what becomes of them"
    assert set(ARGUMENTS) - set(FIELDS) <= NOT_IN_ALL


def test_the_page_names_every_field_and_is_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_table(page), "run python -m fedlora_hf.options.arguments docs/trainer.md"
    assert all(f"| `{name}` |" in page for name in FIELDS)


def other(field: "dataclasses.Field[Any]") -> Any:
    """A value that is not the field's default."""
    if isinstance(field.default, bool) or "bool" in str(field.type):
        return not field.default
    return {"": "1", "length": "size"}.get(field.default, 7) if isinstance(field.default, str) else 7


@pytest.mark.parametrize("name", sorted(n for n, rule in ARGUMENTS.items() if rule.fate in ("replaced", "refused")))
def test_a_refused_field_is_an_error_of_one_line_when_it_is_set(tmp_path: Path, name: str) -> None:
    if name not in FIELDS:
        pytest.skip(f"this transformers has no {name}")
    value = True if name == "remove_unused_columns" else other(FIELDS[name])
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, **{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}=")
    assert "\n" not in message
    assert "say --" in message or "; " in message or "(" in message


def test_a_value_that_cannot_be_followed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be one of random, sequential, group_by_length"):
        config(tmp_path, train_sampling_strategy="batch_rebalance")
    with pytest.raises(ConfigError, match="needs workers"):
        config(tmp_path, dataloader_persistent_workers=True)


def test_defaults_said_aloud_are_no_error(tmp_path: Path) -> None:
    said = {name: field.default for name, field in FIELDS.items() if ARGUMENTS[name].fate != "followed"}
    said = {name: value for name, value in said.items() if value is not dataclasses.MISSING}
    del said["remove_unused_columns"]
    config(tmp_path, **said)


def test_a_field_of_a_later_version_is_refused_when_it_is_set() -> None:
    @dataclasses.dataclass
    class Later:
        seed: int = 42
        quantum: bool = False

    check_arguments(Later(seed=1), ["seed", "quantum"])
    with pytest.raises(ConfigError, match="quantum=True: this version does not know"):
        check_arguments(Later(quantum=True), ["seed", "quantum"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"warmup_steps": 5},
            "warmup_steps=5: has no effect with lr_scheduler_type constant; pass constant_with_warmup",
        ),
        ({"adam_beta1": 0.8, "optim": "sgd"}, "adam_beta1=0.8: has no effect with optimizers that are no Adam"),
        ({"hub_model_id": "a/b"}, "hub_model_id=a/b: has no effect without push_to_hub; pass --push_to_hub"),
        ({CHECKPOINTING: {"use_reentrant": False}}, f"{CHECKPOINTING}=.*no effect"),
        ({"eval_delay": 2}, "eval_delay=2: has no effect without eval_strategy; pass --eval_strategy epoch"),
        ({"eval_steps": 2, "eval_strategy": "epoch"}, "eval_steps=2: has an effect with eval_strategy steps only"),
        ({"save_steps": 3, "save_strategy": "epoch"}, "save_steps=3: has an effect with save_strategy steps only"),
        (
            {"logging_steps": 3, "logging_strategy": "epoch"},
            "logging_steps=3: has an effect with logging_strategy steps",
        ),
        ({"round_lr_scheduler": "cosine", "round_lr_min": 1.0}, "round_lr_min=1.0: must be below learning_rate=0.0"),
    ],
)
def test_what_would_have_no_effect_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}"):
        config(tmp_path, **changes)


def test_every_need_is_of_a_followed_field_and_can_be_met(tmp_path: Path) -> None:
    met = {"lr_scheduler_type": "linear", "push_to_hub": True, "activation_checkpointing": True}
    met |= {"eval_strategy": "steps", "save_strategy": "steps", "hub_model_id": "a/b"}
    args = config(tmp_path, **met)
    for name, need in NEEDS.items():
        assert ARGUMENTS[name].fate == "followed"
        assert need.holds(args), name
