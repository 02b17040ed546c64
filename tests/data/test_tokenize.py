"""Prompts are masked, completions are learned to the end with EOS, and over-long examples keep something to learn."""
# SPDX-License-Identifier: Apache-2.0

import copy
from pathlib import Path

import datasets
import pytest
import sample_data
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from fedlora_hf.data.formats import load_examples
from fedlora_hf.data.tokenize import IGNORED, tokenize_examples, tokenize_prompts
from fedlora_hf.errors import ConfigError


def made(*pairs: tuple[str, str]) -> datasets.Dataset:
    return load_examples(datasets.Dataset.from_list([{"prompt": p, "completion": c} for p, c in pairs]))


def learned(row: dict[str, list[int]]) -> list[int]:
    return [label for label in row["labels"] if label != IGNORED]


def test_every_character_after_the_prompt_is_learned_and_nothing_before(
    dolly: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    examples = load_examples(dolly)
    rows = tokenize_examples(examples, tokenizer, max_length=2000)
    assert len(rows) == len(examples)
    assert rows.column_names == ["input_ids", "labels"]
    for row, example in zip(rows.to_list(), examples.to_list(), strict=True):
        assert tokenizer.decode(row["input_ids"]) == example["prompt"] + example["completion"] + "<eos>"
        assert tokenizer.decode(learned(row)) == example["completion"] + "<eos>"
        masked = len(row["labels"]) - len(learned(row))
        assert row["labels"] == [IGNORED] * masked + row["input_ids"][masked:]


def test_a_prompt_tokenises_alone_as_it_does_in_training(dolly: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    examples = load_examples(dolly)
    rows = tokenize_examples(examples, tokenizer, max_length=2000)
    prompts = tokenize_prompts(examples["prompt"][:], tokenizer, max_length=2000)
    for row, prompt in zip(rows.to_list(), prompts, strict=True):
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"][: len(prompt)] == [IGNORED] * len(prompt)
        assert row["labels"][len(prompt)] != IGNORED


def test_a_token_across_the_boundary_is_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("How coins.")[-2:] == ["Ġcoins", "."]
    row = tokenize_examples(made(("How co", "ins.")), tokenizer, max_length=50)[0]
    assert tokenizer.decode(learned(row)) == " coins.<eos>"


@pytest.mark.parametrize("completion", ["😀 yes", " 😀", "é", "\n\n", "<eos>", ""])
def test_odd_completions(tokenizer: PreTrainedTokenizerFast, completion: str) -> None:
    row = tokenize_examples(made(("Why?\n", completion)), tokenizer, max_length=50)[0]
    assert tokenizer.decode(learned(row)) == completion.removesuffix("<eos>") + "<eos>"


def test_an_empty_prompt_still_has_a_token_before_the_first_label(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = tokenize_examples(made(("", "")), tokenizer, max_length=50)
    assert rows[0] == {"input_ids": [tokenizer.eos_token_id] * 2, "labels": [IGNORED, tokenizer.eos_token_id]}
    assert tokenize_prompts([""], tokenizer, max_length=50) == [[tokenizer.eos_token_id]]
    assert tokenize_prompts([], tokenizer, max_length=50) == []


def test_too_long_examples_lose_the_start_of_the_prompt_first(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt, completion = "one two three four five six seven\n", "eight nine ten"
    whole = tokenize_examples(made((prompt, completion)), tokenizer, max_length=500)[0]
    total, answer = len(whole["input_ids"]), len(learned(whole))
    for length in range(4, total + 1, 3):
        row = tokenize_examples(made((prompt, completion)), tokenizer, max_length=length)[0]
        assert len(row["input_ids"]) == len(row["labels"]) == length
        kept = learned(row)
        before = length - len(kept)
        assert kept == learned(whole)[: len(kept)]
        assert row["input_ids"][:before] == whole["input_ids"][total - answer - before : total - answer]
        assert len(kept) == min(answer, length - max(1, length // 4))


def test_prompts_keep_their_end(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = tokenize_prompts(["one two three\n"], tokenizer, max_length=500)[0]
    assert tokenize_prompts(["one two three\n"], tokenizer, max_length=5)[0] == whole[-5:]


def test_bos_stays_in_front_and_is_never_doubled(tokenizer: PreTrainedTokenizerFast) -> None:
    with_bos = copy.deepcopy(tokenizer)
    with_bos.add_special_tokens({"bos_token": "<bos>"})
    bos = with_bos.bos_token_id
    with_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", bos), ("<eos>", with_bos.eos_token_id)]
    )
    for prompt in ("one two three\n", "<bos>one two three\n"):
        row = tokenize_examples(made((prompt, "four")), with_bos, max_length=500)[0]
        assert with_bos.decode(row["input_ids"]) == "<bos>one two three\nfour<eos>"
        assert with_bos.decode(learned(row)) == "four<eos>"
        short = tokenize_examples(made((prompt, "four")), with_bos, max_length=len(learned(row)) + 3)[0]
        assert short["input_ids"][0] == bos
        assert with_bos.decode(short["input_ids"]).endswith("\nfour<eos>")
        assert with_bos.decode(tokenize_prompts([prompt], with_bos, max_length=500)[0]) == "<bos>one two three\n"
    assert tokenize_examples(made(("", "four")), with_bos, max_length=50)[0]["input_ids"][0] == bos


def test_tokenizers_without_offsets_tokenise_apart(
    dolly: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = load_examples(dolly)
    together = tokenize_examples(examples, tokenizer, max_length=200)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    # The prompts end with a line break, at which this tokenizer always cuts: both ways must agree.
    assert tokenize_examples(examples, tokenizer, max_length=200).to_list() == together.to_list()


def test_classification_rows(dolly: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    examples = load_examples(dolly, task="sequence_classification")
    rows = tokenize_examples(examples, tokenizer, max_length=6, task="sequence_classification")
    assert rows["labels"][:] == examples["label"][:]
    assert max(map(len, rows["input_ids"][:])) == 6
    assert rows[0]["input_ids"] == tokenizer(examples[0]["text"])["input_ids"][:6]


@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification"])
def test_no_examples_give_no_rows(dolly: Path, tokenizer: PreTrainedTokenizerFast, task: str) -> None:
    empty = load_examples(dolly, task=task).select([])
    assert len(tokenize_examples(empty, tokenizer, max_length=50, task=task)) == 0


def test_refusals(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="max_length 3: must be at least 4"):
        tokenize_examples(made(("a", "b")), tokenizer, max_length=3)
    without = copy.deepcopy(tokenizer)
    without.eos_token = None
    with pytest.raises(ConfigError, match="has no eos_token"):
        tokenize_examples(made(("a", "b")), without, max_length=50)


@pytest.mark.real_data
def test_published_dolly_keeps_something_to_learn_in_every_example(
    real_data: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    examples = load_examples(real_data / "dolly" / "databricks-dolly-15k.jsonl").select(range(1500))
    rows = tokenize_examples(examples, tokenizer, max_length=64)
    assert max(map(len, rows["input_ids"][:])) == 64
    assert all(any(label != IGNORED for label in labels[1:]) for labels in rows["labels"][:])
    assert sample_data.CATEGORIES.keys() >= set(examples["group"][:])
