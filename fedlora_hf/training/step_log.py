"""What is told of local steps while they are taken: the loss, of all and of each client, every so many steps."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Clients that have a curve of their own, and entries that stay in memory: a run may have thousands [our choice].
MAX_CURVES, MAX_HISTORY = 64, 10_000


class StepLog:
    """Losses since they were last told. finite: leave out steps whose loss is not (logging_nan_inf_filter)."""

    def __init__(self, finite: bool) -> None:
        self.finite = finite
        self.told = False  # whether anything was told yet
        self._curves: set[str] = set()
        self._sums: dict[str, Tensor] = {}

    def add(self, client: str, loss: Tensor) -> None:
        """Count a step. Nothing is read from the device."""
        pair = torch.stack([loss.detach().float(), torch.ones_like(loss, dtype=torch.float32)])
        if self.finite:
            pair = torch.where(torch.isfinite(pair[0]), pair, torch.zeros_like(pair))
        if len(self._curves) < MAX_CURVES:
            self._curves.add(client)
        for name in ("", client) if client in self._curves else ("",):
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def take(self) -> dict[str, float]:
        """{"loss": mean over the steps, "client/<id>/loss": of a client's alone}; the count starts anew."""
        told = {name: _mean(pair) for name, pair in self._sums.items()}
        self._sums, self.told = {}, True
        named = {f"client/{name}/loss" if name else "loss": mean for name, mean in sorted(told.items())}
        return {name: mean for name, mean in named.items() if mean is not None}


def _mean(pair: Tensor) -> float | None:
    total, count = pair.tolist()
    return total / count if count else None


def input_tokens(inputs: Mapping[str, Any], which: str) -> int:
    """Tokens of a batch: "all" of them, or the "non_padding" ones."""
    if which == "non_padding" and "attention_mask" in inputs:
        return int(inputs["attention_mask"].sum())
    return int(inputs["input_ids"].numel())
