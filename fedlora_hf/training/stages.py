"""The stages of a run: in which rounds what is trained, by whom, and how fast.

Pipeline "none": federated rounds, then, if asked, personal steps. Pipeline "fedlora_optimizer" (arXiv 2510.11274):
federated rounds of the whole adapter, global rounds in which only A's direction is trained, then personal steps on
B's magnitude alone.
"""
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlora_hf.config import FederatedConfig

FACTORS = ("A", "B")
GLOBAL_PARTS = ("A.direction",)
PERSONAL_PARTS = ("B.magnitude",)
# B's magnitudes are few and want far larger steps than LoRA's factors [measured: docs/direction_magnitude.md].
MAGNITUDE_LEARNING_RATE = 5e-2


@dataclass(frozen=True)
class Stage:
    """name: "federated", "global" or "personal". parts: what is trained, factors ("A", "B") or parts of one
    ("A.direction"). on_server: trained on the server's own data instead of the clients'."""

    name: str
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
        return Stage("federated", trains, args.learning_rate)
    rate = args.learning_rate if args.global_learning_rate is None else args.global_learning_rate
    return Stage("global", GLOBAL_PARTS, rate, on_server=args.server_dataset is not None)


def personal_bytes(choice: str, part_bytes: int, whole_bytes: int) -> int:
    """Bytes a client has to keep beside the global adapter for its personal one, by how that was chosen.

    part_bytes: those of what the personal stage trains; whole_bytes: those of a whole adapter. (The folder on disk
    holds a whole adapter in any case, because stock PEFT loads it.)
    """
    return {"global": 0, "global, tuned": part_bytes}.get(choice, whole_bytes)


def personal_stage(args: "FederatedConfig") -> Stage:
    """The stage of the personal steps at the end."""
    in_pipeline = args.pipeline == "fedlora_optimizer"
    default = MAGNITUDE_LEARNING_RATE if in_pipeline else args.learning_rate
    rate = default if args.personal_learning_rate is None else args.personal_learning_rate
    return Stage("personal", PERSONAL_PARTS if in_pipeline else FACTORS, rate)
