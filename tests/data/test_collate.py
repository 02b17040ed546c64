"""Batches are padded to their longest example, and padding is neither attended to nor learned."""
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from fedlora_hf.data.collate import Collator
from fedlora_hf.data.tokenize import IGNORED


def test_causal_batch() -> None:
    batch = Collator(pad_token_id=9)(
        [{"input_ids": [1, 2, 9], "labels": [IGNORED, 2, 9]}, {"input_ids": [4, 5], "labels": [IGNORED, 5]}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 9], [4, 5, 9]]
    # The EOS of the first example has the id of the padding, and is still attended to and learned.
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 9], [IGNORED, 5, IGNORED]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_class_batch() -> None:
    batch = Collator(pad_token_id=0)([{"input_ids": [1], "labels": 2}, {"input_ids": [3, 4], "labels": 0}])
    assert batch["input_ids"].tolist() == [[1, 0], [3, 4]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert batch["labels"].tolist() == [2, 0]


@pytest.mark.parametrize(("length", "width"), [(1, 8), (8, 8), (9, 16)])
def test_width_is_rounded_up(length: int, width: int) -> None:
    batch = Collator(pad_token_id=0, multiple_of=8)([{"input_ids": [1] * length, "labels": [1] * length}])
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(1, width)}
    assert int(batch["attention_mask"].sum()) == length
