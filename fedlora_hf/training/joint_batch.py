"""Several clients' batches as one: padded to a common length and to equally many rows each."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedlora_hf.data.tokenize import IGNORED
from fedlora_hf.errors import ConfigError

_KNOWN = ("input_ids", "attention_mask", "position_ids", "labels", "use_cache")


class Joint(NamedTuple):
    """batch: what the model takes. shapes: (rows, length) of each client's own part. each: rows that every client has
    in `batch`, its own first."""

    batch: dict[str, Any]
    shapes: list[tuple[int, int]]
    each: int

    @property
    def rows(self) -> int:
        return len(self.shapes) * self.each


def joined(batches: Sequence[Mapping[str, Any]], pad: int) -> Joint:
    """The clients' batches, one after the other, (clients * rows, length), padded on the right with `pad`.

    What is added is masked (of packed rows: an example of its own) and has no label. An added row has a mask of ones,
    because attention to nothing at all has no value; it has no loss either. ConfigError for what a batch of this
    package's collator does not hold.
    """
    for batch in batches:
        if odd := sorted(set(batch) - set(_KNOWN)):
            raise ConfigError(
                f"clients_at_once: the data collator's batches hold {odd[0]!r}, and only {', '.join(_KNOWN)} can be "
                "padded together; leave clients_at_once out"
            )
    shapes = [(batch["input_ids"].shape[0], batch["input_ids"].shape[1]) for batch in batches]
    each, length = max(rows for rows, _ in shapes), max(length for _, length in shapes)
    count = len(batches) * each
    found: dict[str, Any] = {"input_ids": batches[0]["input_ids"].new_full((count, length), pad)}
    packed = "position_ids" in batches[0]
    labels = batches[0]["labels"]
    found["labels"] = labels.new_full((count, length) if labels.dim() == 2 else (count,), IGNORED)
    if packed:
        found["position_ids"] = torch.arange(length).repeat(count, 1)
    else:
        found["attention_mask"] = torch.ones(count, length, dtype=torch.long)
    for place, batch in enumerate(batches):
        _fill(found, batch, place * each, *shapes[place])
    if "use_cache" in batches[0]:
        found["use_cache"] = batches[0]["use_cache"]
    return Joint(found, shapes, each)


def _fill(found: Mapping[str, Tensor], batch: Mapping[str, Tensor], first: int, rows: int, length: int) -> None:
    own = slice(first, first + rows)
    found["input_ids"][own, :length] = batch["input_ids"]
    labels = batch["labels"]
    if labels.dim() == 2:
        found["labels"][own, :length] = labels
    else:
        found["labels"][own] = labels
    if "position_ids" in found:
        found["position_ids"][own, :length] = batch["position_ids"]
        found["position_ids"][own, length:] = torch.arange(found["position_ids"].shape[1] - length)
    else:
        found["attention_mask"][own, length:] = 0
        if "attention_mask" in batch:
            found["attention_mask"][own, :length] = batch["attention_mask"]
