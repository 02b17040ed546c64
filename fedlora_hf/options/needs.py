"""Fields of `transformers.TrainingArguments` that act only beside others: set without them, they are refused.

Trainer takes them and does nothing. Our own options say in their fields what they need (`facts.Help.needs`).
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from fedlora_hf.errors import ConfigError, one_line

# Optimizers that have no betas and no epsilon of Adam's, by how their names begin.
_OTHER_OPTIMIZERS = ("sgd", "adagrad", "adafactor", "rmsprop", "lomo")


@dataclass(frozen=True)
class Need:
    """What the other options must be (`holds`), and what is said where they are not."""

    holds: Callable[[Any], bool]
    said: str


def _plain(value: Any) -> str:
    return str(value.value if isinstance(value, Enum) else value)


def _needs(names: str, holds: Callable[[Any], bool], said: str) -> dict[str, Need]:
    return dict.fromkeys(names.split(), Need(holds, said))


NEEDS: Mapping[str, Need] = {
    **_needs(
        "warmup_steps",
        lambda args: _plain(args.lr_scheduler_type) not in ("constant", "reduce_lr_on_plateau"),
        "has no effect with lr_scheduler_type constant; pass constant_with_warmup, linear or cosine",
    ),
    **_needs(
        "adam_beta1 adam_beta2 adam_epsilon",
        lambda args: not _plain(args.optim).startswith(_OTHER_OPTIMIZERS),
        "has no effect with optimizers that are no Adam; pass their own in optim_args",
    ),
    **_needs(
        "hub_model_id",
        lambda args: bool(args.push_to_hub),
        "has no effect without push_to_hub; pass --push_to_hub",
    ),
    **_needs(
        "gradient_checkpointing_kwargs activation_checkpointing_kwargs",
        lambda args: bool(args.gradient_checkpointing),
        "has no effect without activation_checkpointing; pass --activation_checkpointing",
    ),
    **_needs(
        "eval_delay eval_on_start",
        lambda args: _plain(args.eval_strategy) != "no",
        "has no effect without eval_strategy; pass --eval_strategy epoch",
    ),
    **_needs(
        "eval_steps",
        lambda args: _plain(args.eval_strategy) == "steps",
        "has an effect with eval_strategy steps only; pass --eval_strategy steps",
    ),
    **_needs(
        "save_steps",
        lambda args: _plain(args.save_strategy) == "steps",
        "has an effect with save_strategy steps only; pass --save_strategy steps",
    ),
    **_needs(
        "logging_steps",
        lambda args: _plain(args.logging_strategy) == "steps",
        "has an effect with logging_strategy steps only; pass --logging_strategy steps",
    ),
}


def check_needs(args: Any, given: Collection[str]) -> None:
    """ConfigError for the first of the fields that were set (`given`) and cannot have an effect beside the others."""
    for name in sorted(set(given) & NEEDS.keys()):
        if not NEEDS[name].holds(args):
            raise ConfigError(f"{name}={one_line(_plain(getattr(args, name)), 80)}: {NEEDS[name].said}")
