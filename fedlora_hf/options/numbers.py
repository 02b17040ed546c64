"""What the numbers among the followed fields of `transformers.TrainingArguments` may be.

Trainer takes some of what makes no sense (a batch of 0, a negative weight decay) and fails later, in its own words, or
not at all. The table is total over the numbers that are followed (a test compares it).
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterable, Mapping
from typing import Any

from fedlora_hf.options.facts import Bound, Kind, at_least, check_number, not_negative, positive, share

_SEED = Bound(lambda n: 0 <= n < 2**32, "must be a whole number from 0 to 2^32 - 1", "42 for instance")
# {field: (int or float, what it must satisfy)}.
NUMBERS: Mapping[str, tuple[Kind, Bound]] = {
    "per_device_train_batch_size": (int, at_least(1, "a step needs an example")),
    "per_device_eval_batch_size": (int, at_least(1, "leave it out for 8")),
    "gradient_accumulation_steps": (int, at_least(1, "1 steps after every batch")),
    "warmup_steps": (float, not_negative("a number below 1 is a share of a client's steps in a round")),
    "weight_decay": (float, not_negative("0 decays nothing")),
    "adam_beta1": (float, share("leave it out for 0.9")),
    "adam_beta2": (float, share("leave it out for 0.999")),
    "adam_epsilon": (float, not_negative("leave it out for 1e-8")),
    "max_grad_norm": (float, at_least(0, "0 clips nothing")),
    "label_smoothing_factor": (float, share("0 smooths nothing")),
    "torch_empty_cache_steps": (int, at_least(1, "leave it out to keep the cache")),
    "logging_steps": (float, positive("logging_strategy=no logs nothing")),
    "eval_steps": (float, positive("leave it out to evaluate every round, or eval_strategy for none")),
    "eval_delay": (float, not_negative("0 waits for nothing")),
    "eval_accumulation_steps": (int, at_least(1, "leave it out")),
    "save_steps": (float, positive("save_strategy=no calls on_save never")),
    "save_total_limit": (int, at_least(1, "leave it out, and say --keep_rounds 0, to keep all")),
    "seed": (int, _SEED),
    "data_seed": (int, _SEED),
    "dataloader_num_workers": (int, at_least(0, "0 loads in the process itself")),
    "dataloader_prefetch_factor": (int, at_least(1, "leave it out for 2")),
    "ddp_timeout": (int, at_least(1, "seconds; leave it out for half an hour")),
    "local_rank": (int, at_least(-1, "the launcher sets it; leave it out")),
}


def check_numbers(args: Any, names: Iterable[str]) -> None:
    """ConfigError for the first of the fields `names` whose number is none, or out of its bound; None passes."""
    for name in sorted(set(names) & NUMBERS.keys()):
        check_number(name, getattr(args, name), *NUMBERS[name])
