"""Packed examples are computed as they are alone: the same loss, nothing of a neighbour, all examples once."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from fedlora_hf.data.collate import Collator
from fedlora_hf.data.packing import PackedRows, check_packing, fill
from fedlora_hf.data.rows import TokenRows
from fedlora_hf.data.tokenize import IGNORED
from fedlora_hf.errors import ConfigError


@settings(deadline=None, database=None)
@given(lengths=st.lists(st.integers(1, 40), max_size=60), capacity=st.integers(10, 50))
def test_every_example_is_in_one_bin_that_holds_it(lengths: list[int], capacity: int) -> None:
    bins = fill(lengths, capacity)
    assert sorted(place for places in bins for place in places) == list(range(len(lengths)))
    sums = [sum(lengths[place] for place in places) for places in bins]
    assert all(total <= capacity or len(places) == 1 for total, places in zip(sums, bins, strict=True))
    # No two bins could have been one: best fit leaves none half empty but the last.
    assert sum(total * 2 <= capacity for total in sums) <= 1
    assert fill(lengths, capacity) == bins


def packed(count: int = 9, capacity: int = 24) -> tuple[TokenRows, PackedRows]:
    rows = TokenRows(models.token_examples(count, seed=3))
    return rows, PackedRows(rows, capacity)


def summed(model: Any, rows: Any, size: int) -> float:
    """The loss of all rows, summed over the tokens that have a label."""
    total, collate = 0.0, Collator(0)
    for start in range(0, len(rows), size):
        batch = collate([rows[place] for place in range(start, min(start + size, len(rows)))])
        with torch.no_grad():
            loss = model(**batch).loss
        total += float(loss) * int((batch["labels"][:, 1:] != IGNORED).sum())
    return total


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("size", [1, 3])
def test_the_loss_is_that_of_the_examples_alone(attention: str, size: int) -> None:
    rows, together = packed()
    assert len(together) < len(rows) == together.num_examples
    assert sum(together.lengths) == sum(rows.lengths)
    model = models.tiny_llama(attn_implementation=attention).eval()
    assert summed(model, together, size) == pytest.approx(summed(model, rows, 1), rel=1e-5)


def test_a_neighbour_changes_nothing() -> None:
    _, together = packed()
    model = models.tiny_llama().eval()
    batch = Collator(0, multiple_of=8)([together[0]])
    assert "attention_mask" not in batch
    first = int((batch["position_ids"][0][1:] == 0).nonzero()[0]) + 1  # where the second example starts
    changed = batch["input_ids"].clone()
    changed[:, :first] = 5
    with torch.no_grad():
        before, after = (
            model(input_ids=ids, position_ids=batch["position_ids"], use_cache=False).logits[:, first:]
            for ids in (batch["input_ids"], changed)
        )
    assert torch.equal(before, after)
    assert batch["labels"][0, first] == IGNORED


def test_models_that_keep_examples_apart_are_told_from_those_that_mix_them() -> None:
    check_packing(models.tiny_llama())
    neox = GPTNeoXConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    check_packing(GPTNeoXForCausalLM(neox))

    class Mixing(GPT2LMHeadModel):
        def forward(self, input_ids: Any = None, position_ids: Any = None, **more: Any) -> Any:
            return super().forward(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))

    with pytest.raises(ConfigError, match="packing: Mixing does not keep packed examples apart"):
        check_packing(Mixing(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2)))


def test_a_packed_run_counts_examples_and_trains(tmp_path: Path) -> None:
    trainer = models.federation(tmp_path, packing=True, max_length=32, num_rounds=1)
    assert [len(data.train) < data.train.num_examples for data in trainer.clients.values()] == [True] * 3
    trainer.train()
    assert {name: facts["num_examples"] for name, facts in trainer.run.record.clients.items()} == {
        "ada": 4,
        "bob": 6,
        "eve": 5,
    }
