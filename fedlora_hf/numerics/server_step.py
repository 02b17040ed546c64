"""The server's optimizers entry by entry: a round's change is a gradient turned round, and a state is carried along.

Reddi et al. 2021 (arXiv 2003.00295), algorithm 2; momentum as Hsu et al. 2019 (arXiv 1909.06335). Pure: tensors in,
tensors and the next state out, in float32, computed in float64.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("avgm", "adam", "yogi", "adagrad")


@dataclass(frozen=True)
class Rule:
    """kind: one of KINDS. learning_rate: eta. momentum: beta of avgm, beta_1 of the others. beta2: of adam and yogi.
    tau: the adaptivity, added to the root of the second moment, which begins at tau^2."""

    kind: str
    learning_rate: float
    momentum: float
    beta2: float = 0.99
    tau: float = 1e-3

    @property
    def nothing(self) -> bool:
        """Whether the step is the round's own result."""
        return self.kind == "avgm" and self.momentum == 0 and self.learning_rate == 1


def step(rule: Rule, start: Tensor, new: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """(where the server goes, the next state) from where the round began and what its clients' mean is.

    state: {"m": ..., "v": ...} of the tensor's shape; {} before the first round. avgm: m = beta m + d, x + eta m.
    The others: m = beta_1 m + (1 - beta_1) d, x + eta m / (sqrt(v) + tau), with v by kind.
    """
    begin, end = start.double(), new.double()
    change = end - begin
    old = state["m"].to(change) if "m" in state else torch.zeros_like(change)
    if rule.kind == "avgm":
        m = rule.momentum * old + change
        return (begin + rule.learning_rate * m).float(), {"m": m.float()}
    m = rule.momentum * old + (1 - rule.momentum) * change
    v = second_moment(rule, change, state["v"].to(change) if "v" in state else torch.full_like(change, rule.tau**2))
    moved = begin + rule.learning_rate * m / (v.sqrt() + rule.tau)
    return moved.float(), {"m": m.float(), "v": v.float()}


def second_moment(rule: Rule, change: Tensor, v: Tensor) -> Tensor:
    """The next v: a sum (adagrad), a moving mean (adam), or one that moves by at most (1 - beta_2) d^2 (yogi)."""
    square = change.square()
    if rule.kind == "adagrad":
        return v + square
    if rule.kind == "adam":
        return rule.beta2 * v + (1 - rule.beta2) * square
    return v - (1 - rule.beta2) * square * (v - square).sign()
