"""Metrics against the same numbers worked out by hand, whatever the batches."""
# SPDX-License-Identifier: Apache-2.0

import math
from types import SimpleNamespace

import models
import pytest
import torch
from torch import Tensor, nn

from fedlora_hf.data.collate import Collator
from fedlora_hf.training.metrics import generate_answers, held_out_metrics, mean_metrics

COLLATE = Collator(pad_token_id=0)


class Certain(nn.Module):
    """A language model that gives `sure` probability to the next token being this one plus 1, the rest evenly."""

    def __init__(self, sure: float, vocabulary: int = 10) -> None:
        super().__init__()
        rest = (1 - sure) / (vocabulary - 1)
        table = torch.full((vocabulary, vocabulary), math.log(rest))
        table[torch.arange(vocabulary), (torch.arange(vocabulary) + 1) % vocabulary] = math.log(sure)
        self.table = nn.Parameter(table)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def test_causal_metrics_are_means_over_answer_tokens() -> None:
    """Two answers of 1 and 3 tokens, one of the four tokens wrong: means over tokens, not over answers."""
    examples = [
        {"input_ids": [3, 4, 5], "labels": [-100, -100, 5]},
        {"input_ids": [1, 2, 3, 9], "labels": [-100, 2, 3, 9]},
    ]
    sure, wrong = 0.6, 0.4 / 9
    loss = -(3 * math.log(sure) + math.log(wrong)) / 4
    for batch_size in (1, 2):
        found = held_out_metrics(Certain(sure), examples, COLLATE, task="causal_lm", batch_size=batch_size)
        assert found == pytest.approx(
            {"loss": loss, "perplexity": math.exp(loss), "token_accuracy": 0.75, "num_items": 4}
        )


def test_the_first_token_is_predicted_from_nothing_and_so_not_counted() -> None:
    examples = [{"input_ids": [8, 9], "labels": [8, 9]}]
    assert held_out_metrics(Certain(0.5), examples, COLLATE, task="causal_lm", batch_size=1)["num_items"] == 1


def test_loss_is_the_models_own() -> None:
    model, examples = models.tiny_llama().eval(), models.token_examples(5, seed=3)
    found = held_out_metrics(model, examples, COLLATE, task="causal_lm", batch_size=5)
    with torch.no_grad():
        own = model(**COLLATE(list(examples))).loss
    assert found["loss"] == pytest.approx(float(own), rel=1e-5)
    for batch_size in (1, 2, 3):
        again = held_out_metrics(model, examples, COLLATE, task="causal_lm", batch_size=batch_size)
        assert again == pytest.approx(found, rel=1e-5)


def test_class_metrics_are_means_over_examples() -> None:
    model, examples = models.tiny_classifier().eval(), models.class_examples(7, seed=0)
    found = held_out_metrics(model, examples, COLLATE, task="sequence_classification", batch_size=3)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(examples["input_ids"][:])).logits
    labels = torch.tensor(examples["labels"][:])
    loss = -torch.log_softmax(logits, -1)[torch.arange(7), labels].mean()
    right = (logits.argmax(-1) == labels).float().mean()
    assert found == pytest.approx({"loss": float(loss), "accuracy": float(right), "num_items": 7}, rel=1e-5)


def test_an_empty_split_has_no_metrics_and_the_mode_is_put_back() -> None:
    model = models.tiny_llama().train()
    assert held_out_metrics(model, [], COLLATE, task="causal_lm", batch_size=2) == {}
    assert model.training


def test_a_hopeless_loss_has_infinite_perplexity() -> None:
    model = Certain(0.5)
    model.table.data.fill_(0.0)
    model.table.data[:, 0] = 2000.0
    found = held_out_metrics(
        model, [{"input_ids": [1, 2], "labels": [-100, 2]}], COLLATE, task="causal_lm", batch_size=1
    )
    assert found["loss"] == 2000.0
    assert found["perplexity"] == math.inf


def test_greedy_answers_do_not_depend_on_the_batch() -> None:
    tokenizer = models.tiny_tokenizer()
    model = models.tiny_llama(vocab_size=len(tokenizer)).eval()
    prompts = [tokenizer("How many coins?")["input_ids"], tokenizer("Why")["input_ids"], [5]]
    together = generate_answers(model, prompts, tokenizer, max_new_tokens=6)
    alone = [generate_answers(model, [prompt], tokenizer, max_new_tokens=6)[0] for prompt in prompts]
    assert together == alone
    by_hand = list(prompts[0])
    for _ in range(6):
        with torch.no_grad():
            by_hand.append(int(model(input_ids=torch.tensor([by_hand])).logits[0, -1].argmax()))
        if by_hand[-1] == tokenizer.eos_token_id:
            break
    assert together[0] == tokenizer.decode(by_hand[len(prompts[0]) :], skip_special_tokens=True)


def test_means_are_over_clients_and_perplexity_is_of_the_mean_loss() -> None:
    rows = [
        {"loss": 1.0, "perplexity": math.e, "token_accuracy": 0.5, "num_items": 3.0, "rouge_l": 1.0},
        {},
        {"loss": 3.0, "perplexity": math.e**3, "token_accuracy": 1.0, "num_items": 300.0},
    ]
    assert mean_metrics(rows) == pytest.approx({"loss": 2.0, "perplexity": math.e**2, "token_accuracy": 0.75})
    assert mean_metrics([{}]) == {}
