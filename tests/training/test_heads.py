"""Losses from logits at answered positions alone are those from all logits, with and without a cap or a scale."""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import models
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    modeling_utils,
)

from fedlora_hf.data.collate import Collator
from fedlora_hf.training.batches import right_sized
from fedlora_hf.training.heads import answered_logits, takes_mask
from fedlora_hf.training.metrics import held_out_metrics

COLLATE = Collator(pad_token_id=0)
MASKED = hasattr(modeling_utils, "slice_logits_to_keep")  # before transformers 5.21 no model takes a mask
SHAPE: dict[str, Any] = {
    "vocab_size": models.VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "gpt2": GPT2Config(vocab_size=models.VOCABULARY, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=1),
    "gemma2": Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=0.2),
    "cohere": CohereConfig(**SHAPE, logit_scale=0.3),
    "granite": GraniteConfig(**SHAPE, logits_scaling=0.5),
}


def built(config: PreTrainedConfig) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).float().eval()


def by_all_logits(model: Any, examples: Any, batch_size: int) -> tuple[float, float]:
    """(mean loss, accuracy) from the logits of every position, batch by batch in the order of the examples."""
    nats, right, items = 0.0, 0, 0
    for start in range(0, len(examples), batch_size):
        batch = COLLATE([examples[row] for row in range(start, min(start + batch_size, len(examples)))])
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            logits = model(**batch).logits[:, :-1]
        at = labels != -100
        nats += float(cross_entropy(logits[at], labels[at], reduction="sum"))
        right += int((logits[at].argmax(-1) == labels[at]).sum())
        items += int(at.sum())
    return nats / items, right / items


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("adapted", [False, True])
def test_losses_are_those_of_all_logits(kind: str, adapted: bool) -> None:
    model = built(CONFIGS[kind])
    if adapted:
        targets = ["c_attn"] if kind == "gpt2" else ["q_proj", "v_proj"]
        config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, fan_in_fan_out=kind == "gpt2")
        model = get_peft_model(model, config).eval()
    assert takes_mask(model) is MASKED
    examples = models.token_examples(9, seed=2, length=14)
    loss, accuracy = by_all_logits(model, examples, 4)
    for batch_size in (1, 4, 9):
        found = held_out_metrics(model, examples, COLLATE, task="causal_lm", batch_size=batch_size)
        assert found["loss"] == pytest.approx(loss, abs=1e-6)
        assert found["token_accuracy"] == accuracy


@pytest.mark.skipif(not MASKED, reason="no model of this transformers takes a mask of positions")
def test_the_head_sees_answered_positions_alone() -> None:
    model, seen = models.tiny_llama().eval(), []
    model.lm_head.register_forward_hook(lambda head, inputs, output: seen.append(output.shape))
    batch = COLLATE(
        [{"input_ids": [3, 4, 5, 6], "labels": [-100, -100, -100, 6]}, {"input_ids": [7, 8], "labels": [7, 8]}]
    )
    answered = batch.pop("labels")[:, 1:] != -100
    assert answered_logits(model, batch, answered).shape == (2, models.VOCABULARY)
    assert seen == [(2, models.VOCABULARY)]


class Doubled(LlamaForCausalLM):
    """A model with a forward of its own, which takes no mask."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:  # type: ignore[override]
        found = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        found.logits = found.logits * 2
        return found


def test_a_forward_of_ones_own_gives_all_logits() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Doubled(CONFIGS["llama"]).eval()
    assert not takes_mask(model)
    examples = models.token_examples(4, seed=2)
    found = held_out_metrics(model, examples, COLLATE, task="causal_lm", batch_size=2)
    assert found["loss"] == pytest.approx(by_all_logits(model, examples, 2)[0], abs=1e-6)


def test_a_compiled_model_is_left_as_it_is() -> None:
    model = models.tiny_llama()
    model.compile(backend="eager")
    assert not takes_mask(model)


def rows(*sizes: tuple[int, int]) -> list[dict[str, list[int]]]:
    """Examples of (tokens, answered ones)."""
    return [{"input_ids": [2] * n, "labels": [-100] * (n - own) + [2] * own} for n, own in sizes]


def test_batches_hold_no_more_than_the_longest_examples_would() -> None:
    # Two of 8 tokens are 16: one of 8 with one of 6 (2 x 8), then four of 3 (12), and the fifth fits as well (15).
    examples = rows((3, 1), (8, 1), (3, 1), (6, 1), (3, 1), (3, 1), (3, 1))
    assert right_sized(examples, 2) == [[1, 3], [0, 2], [4, 5], [6]]  # two answers at a time
    examples[1] = rows((8, 3))[0]
    assert right_sized(examples, 2) == [[1, 3], [0, 2, 4, 5, 6]]
    assert right_sized([], 2) == []


def test_examples_of_classes_are_batched_by_number() -> None:
    examples = [{"input_ids": [2] * n, "labels": 0} for n in (2, 9, 2, 2)]
    assert right_sized(examples, 2) == [[1, 0], [2, 3]]


def test_every_row_is_in_one_batch() -> None:
    examples = models.token_examples(40, seed=1, length=30)
    batches = right_sized(examples, 3)
    assert sorted(row for batch in batches for row in batch) == list(range(40))
    longest = max(map(len, examples["input_ids"]))
    for batch in batches:
        widths = [len(examples[row]["input_ids"]) for row in batch]
        assert len(batch) * max(widths) <= 3 * longest
        assert widths == sorted(widths, reverse=True)
