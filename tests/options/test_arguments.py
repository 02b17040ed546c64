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

PAGE = Path(__file__).parents[2] / "docs" / "trainer.md"
FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments)}


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
