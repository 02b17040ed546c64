"""Numbers from outside: each has a bound, Trainer's and our own, and what is out of it is one line before torch."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import math
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from transformers import TrainingArguments

from fedlora_hf import FederatedConfig
from fedlora_hf.errors import ConfigError
from fedlora_hf.options import GROUPS
from fedlora_hf.options.arguments import ARGUMENTS
from fedlora_hf.options.early import checked
from fedlora_hf.options.facts import facts_of, kind_of
from fedlora_hf.options.numbers import NUMBERS

OWN = {item.name: item for group in GROUPS for item in dataclasses.fields(group)}
THEIRS = {item.name: item for item in dataclasses.fields(TrainingArguments)}
BELOW = {
    **{name: NUMBERS[name][0] for name in NUMBERS},
    **{n: k for n, i in OWN.items() if (k := kind_of(i)) in (int, float)},
}


def config(folder: Path, **changes: Any) -> FederatedConfig:
    return FederatedConfig(**models.options(folder, **changes))


def test_every_number_that_is_followed_has_a_bound() -> None:
    followed = {name for name, item in THEIRS.items() if ARGUMENTS[name].fate == "followed" and name not in OWN}
    numbers = {name: kind for name in followed if (kind := kind_of(THEIRS[name])) in (int, float)}
    assert {name: kind for name, (kind, _) in NUMBERS.items()} == numbers


def test_every_number_of_our_own_has_a_bound() -> None:
    bare = [name for name, item in OWN.items() if kind_of(item) in (int, float) and facts_of(item).bound is None]  # type: ignore[union-attr]
    assert bare == []


@pytest.mark.parametrize("name", sorted(BELOW))
@pytest.mark.parametrize("text", ["-7", "nan"])
def test_what_is_no_number_for_it_is_one_line_that_names_it(name: str, text: str, tmp_path: Path) -> None:
    """-7 and NaN are right for nothing here; on the command line that is known before torch is imported."""
    if BELOW[name] is int and text == "nan":
        text = "2.5"
    with pytest.raises(ConfigError, match=rf"^{name}={text}: .*; ") as early:
        checked([f"--{name}", text])
    value = BELOW[name](text) if text != "2.5" else 2.5
    with pytest.raises(ConfigError, match=rf"^{name}={text}(\.0)?: must .*; .") as late:
        config(tmp_path, **{name: value})
    assert "\n" not in str(early.value) + str(late.value)


@pytest.mark.parametrize("value", [True, "8", 8.0, [8]])
def test_what_only_looks_like_a_number_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^lora_r=.*: must be a whole number; pass a positive rank"):
        config(tmp_path, lora_r=value)
    with pytest.raises(ConfigError, match=r"^gradient_accumulation_steps=.*: must be a whole number; 1 steps"):
        config(tmp_path, gradient_accumulation_steps=value)


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    args = config(tmp_path, lora_r=np.int64(4), learning_rate=np.float32(0.5), seed=np.uint32(7))
    assert (args.lora_r, args.seed) == (4, 7)


@pytest.mark.parametrize("name", ["learning_rate", "local_epochs", "fedprox_mu", "weight_decay", "warmup_steps"])
def test_what_must_be_finite_is(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}=inf: must be a finite number"):
        config(tmp_path, **{name: math.inf})


def test_a_batch_of_none_is_refused_and_not_divided_by(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^per_device_train_batch_size=0: must be at least 1; a step needs an example"
    ):
        config(tmp_path, per_device_train_batch_size=0)
