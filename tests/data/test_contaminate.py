"""Each kind spoils the answers in its own way, leaves inputs and order alone, and is a function of the seed."""
# SPDX-License-Identifier: Apache-2.0

from collections import Counter
from pathlib import Path

import datasets
import pytest

from fedlora_hf.data.contaminate import CONSTANT, KINDS, contaminate
from fedlora_hf.data.formats import load_examples
from fedlora_hf.errors import ConfigError, DataError


@pytest.fixture
def examples(dolly: Path) -> datasets.Dataset:
    return load_examples(dolly)


@pytest.fixture
def labelled(dolly: Path) -> datasets.Dataset:
    return load_examples(dolly, task="sequence_classification")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_only_answers_change_as_a_function_of_the_seed(
    examples: datasets.Dataset, labelled: datasets.Dataset, kind: str
) -> None:
    source = labelled if kind.endswith("_labels") else examples
    answers = {"label"} if kind.endswith("_labels") else {"completion", "references"}
    before = source.to_list()
    spoiled = contaminate(source, kind, seed=1)
    assert source.to_list() == before
    assert spoiled.features == source.features
    for name in set(source.column_names) - answers:
        assert spoiled[name][:] == source[name][:]
    assert all(spoiled[name][:] != source[name][:] for name in answers)
    assert contaminate(source, kind, seed=1).to_list() == spoiled.to_list()
    if kind != "constant":
        assert contaminate(source, kind, seed=2).to_list() != spoiled.to_list()


def test_shuffled_outputs_move_every_one(examples: datasets.Dataset) -> None:
    numbered = examples.remove_columns("completion").add_column("completion", [str(i) for i in range(len(examples))])
    moved = contaminate(numbered, "shuffled")["completion"][:]
    assert sorted(moved, key=int) == numbered["completion"][:]
    assert all(int(text) != place for place, text in enumerate(moved))


def test_random_outputs_keep_the_length_in_words_and_the_vocabulary(examples: datasets.Dataset) -> None:
    spoiled = contaminate(examples, "random_outputs")
    words = {word for text in examples["completion"] for word in text.split()}
    for before, after in zip(examples["completion"], spoiled["completion"], strict=True):
        assert len(after.split()) == len(before.split())
        assert set(after.split()) <= words
    assert spoiled["references"][:] == [[text] for text in spoiled["completion"]]


def test_constant_output(examples: datasets.Dataset) -> None:
    assert set(contaminate(examples, "constant")["completion"]) == {CONSTANT}


def test_labels_keep_their_frequencies_or_become_uniform(labelled: datasets.Dataset) -> None:
    shuffled = contaminate(labelled, "shuffled_labels")["label"][:]
    assert Counter(shuffled) == Counter(labelled["label"][:])
    many = datasets.concatenate_datasets([labelled] * 20)
    counts = Counter(contaminate(many, "random_labels")["label"][:])
    assert len(counts) == 8
    assert max(counts.values()) < 2 * min(counts.values())


@pytest.mark.parametrize("kind", ["shuffled", "random_outputs", "constant"])
def test_a_single_example(examples: datasets.Dataset, kind: str) -> None:
    assert len(contaminate(examples.select([0]), kind)) == 1


def test_refusals(examples: datasets.Dataset, labelled: datasets.Dataset) -> None:
    with pytest.raises(ConfigError, match="contamination 'noise': must be one of random_outputs"):
        contaminate(examples, "noise")
    with pytest.raises(DataError, match="needs a label column"):
        contaminate(examples, "random_labels")
    with pytest.raises(DataError, match="needs a completion column"):
        contaminate(labelled, "shuffled")
