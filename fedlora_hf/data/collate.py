"""Token ids into padded batches, for a causal LM (a label a token) and for classification (a label an example)."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from fedlora_hf.data.tokenize import IGNORED


class Example(TypedDict):
    """A row of `tokenize_examples`."""

    input_ids: list[int]
    labels: list[int] | int
    position_ids: NotRequired[list[int]]


@dataclass(frozen=True)
class Collator:
    """Pads on the right to the longest example of the batch, rounded up to a multiple of `multiple_of`.

    pad_token_id: may be the EOS; the attention mask comes from the lengths and never from the ids.
    multiple_of: 8 lets a GPU use its tensor cores in half precision.
    """

    pad_token_id: int
    multiple_of: int = 1

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """input_ids, attention_mask (batch, length) and labels: (batch, length) or, for classes, (batch,).

        Of packed rows, position_ids in the place of the attention mask: padding is one more example, without labels.
        """
        lengths = [len(example["input_ids"]) for example in examples]
        width = -(-max(lengths) // self.multiple_of) * self.multiple_of
        labels = [example["labels"] for example in examples]
        per_token = [label for label in labels if isinstance(label, list)]
        ids = _pad([example["input_ids"] for example in examples], width, self.pad_token_id)
        batch: dict[str, Any] = {"input_ids": ids}
        if "position_ids" in examples[0]:
            places = [example["position_ids"] for example in examples]
            batch["position_ids"] = torch.tensor([[*row, *range(width - len(row))] for row in places])
            # Beside a cache, transformers does not look for examples in the positions.
            batch["use_cache"] = False
        else:
            batch["attention_mask"] = _pad([[1] * length for length in lengths], width, 0)
        return {**batch, "labels": _pad(per_token, width, IGNORED) if per_token else torch.tensor(labels)}


def _pad(rows: list[list[int]], width: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])
