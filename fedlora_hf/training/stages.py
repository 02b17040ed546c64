"""The stages of a run: in which rounds what is trained, by whom, and how fast.

Pipeline "none": federated rounds, then, if asked, personal steps. Pipeline "fedlora_optimizer" (arXiv 2510.11274):
federated rounds of the whole adapter, global rounds in which only A's direction is trained, then personal steps on
B's magnitude alone.
"""
# SPDX-License-Identifier: Apache-2.0

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlora_hf.config import FederatedConfig

FACTORS = ("A", "B")
GLOBAL_PARTS = ("A.direction",)
PERSONAL_PARTS = ("B.magnitude",)
# B's magnitudes are few and want far larger steps than LoRA's factors [measured: docs/direction_magnitude.md].
MAGNITUDE_LEARNING_RATE = 5e-2


class StageName(StrEnum):
    """The values are those of run.json."""

    FEDERATED = "federated"  # every client trains what the method shares
    GLOBAL = "global"  # the shared direction is trained on, by the clients or by the server on data of its own
    PERSONAL = "personal"  # every client by itself, after the rounds
    AGGREGATE = "aggregate"  # adapters trained elsewhere are combined once


@dataclass(frozen=True)
class Stage:
    """parts: what is trained, factors ("A", "B") or parts of one
    ("A.direction"). on_server: trained on the server's own data instead of the clients'."""

    name: StageName
    parts: tuple[str, ...]
    learning_rate: float
    on_server: bool = False

    @property
    def untrained(self) -> list[str]:
        """The factors of which nothing is trained."""
        return [factor for factor in FACTORS if not any(part.startswith(factor) for part in self.parts)]


def total_rounds(args: "FederatedConfig") -> int:
    """Rounds of the run, global ones included."""
    return args.num_rounds + (args.global_rounds if args.pipeline == "fedlora_optimizer" else 0)


def round_stage(args: "FederatedConfig", trains: tuple[str, ...], number: int) -> Stage:
    """The stage of a round; `trains`: the factors that the aggregation method has its clients train."""
    if number <= args.num_rounds:
        return Stage(StageName.FEDERATED, trains, round_learning_rate(args, number))
    rate = args.learning_rate if args.global_learning_rate is None else args.global_learning_rate
    return Stage(StageName.GLOBAL, GLOBAL_PARTS, rate, on_server=args.server_dataset is not None)


def round_learning_rate(args: "FederatedConfig", number: int) -> float:
    """The learning rate of federated round `number` (1, 2 ...), as round_lr_scheduler says.

    It rises over round_lr_warmup rounds, reaches learning_rate in the one after them and, unless it is constant, comes
    to round_lr_min in the last, along a line or half a cosine (Loshchilov, Hutter 2017, arXiv 1608.03983).
    """
    peak, warmup, last = args.learning_rate, args.round_lr_warmup, args.num_rounds
    if number <= warmup:
        return peak * number / (warmup + 1)
    if args.round_lr_scheduler == "constant" or last <= warmup + 1:
        return peak
    done = (number - warmup - 1) / (last - warmup - 1)
    left = 1 - done if args.round_lr_scheduler == "linear" else (1 + math.cos(math.pi * done)) / 2
    return args.round_lr_min + (peak - args.round_lr_min) * left


def personal_stage(args: "FederatedConfig") -> Stage:
    """The stage of the personal steps at the end."""
    in_pipeline = args.pipeline == "fedlora_optimizer"
    default = MAGNITUDE_LEARNING_RATE if in_pipeline else args.learning_rate
    rate = default if args.personal_learning_rate is None else args.personal_learning_rate
    return Stage(StageName.PERSONAL, PERSONAL_PARTS if in_pipeline else FACTORS, rate)
