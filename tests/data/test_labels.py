"""What may be a label, whose order the classes have, and what is said of uneven ones."""
# SPDX-License-Identifier: Apache-2.0

from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from fedlora_hf.data.formats import load_examples
from fedlora_hf.data.labels import class_counts, head_labels, imbalance
from fedlora_hf.errors import DataError


def made(values: list[Any], **options: Any) -> datasets.Dataset:
    rows = datasets.Dataset.from_dict({"text": ["t"] * len(values), "label": values})
    return load_examples(rows, task="sequence_classification", **options)


def test_whole_numbers_of_a_table_are_classes() -> None:
    assert made([1.0, 0.0, 1.0]).features["label"].names == ["0", "1"]


def test_fractions_and_several_labels_are_refused_in_one_line() -> None:
    with pytest.raises(DataError, match=r"record 2, label column 'label': 0.5 is no class, and regression is not"):
        made([1.0, 0.5])
    with pytest.raises(DataError, match="record 1, label column 'label': holds 2 labels, and several labels"):
        made([["a", "b"], ["a"]])


def test_the_heads_order_counts_where_it_knows_the_names() -> None:
    assert made(["neg", "pos"], head=["pos", "neg", "so so"]).features["label"].names == ["pos", "neg", "so so"]
    assert made(["neg", "pos"], head=["other", "neg"]).features["label"].names == ["neg", "pos"]
    assert made(["neg", "pos"], head=["pos", "neg"], labels=["neg", "pos"]).features["label"].names == ["neg", "pos"]


def test_names_of_a_head() -> None:
    assert head_labels(SimpleNamespace(id2label={0: "pos", 1: "neg"})) == ["pos", "neg"]
    assert head_labels(SimpleNamespace(id2label={0: "LABEL_0", 1: "LABEL_1"})) is None
    assert head_labels(SimpleNamespace(id2label={3: "pos", 1: "neg"})) is None
    assert head_labels(None) is None


def test_uneven_classes_are_told() -> None:
    counts = class_counts(made(["a"] * 19 + ["b"]))
    assert counts == {"a": 19, "b": 1}
    assert imbalance(counts) == (
        "classes are uneven: 'a' has 19 examples (95%), 'b' 1; always saying the first is right so often"
    )
    assert imbalance({"a": 5, "b": 4}) is None
    assert "'b' 0;" in str(imbalance({"a": 5, "b": 0}))
