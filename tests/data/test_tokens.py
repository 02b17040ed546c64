"""Data that came as tokens: masks are followed, what a batch cannot be made of is refused, what is lost is counted."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path
from typing import Any

import datasets
import models
import pandas as pd
import pytest

from fedlora_hf import FederatedConfig
from fedlora_hf.data.prepare import ClientData, prepare_client
from fedlora_hf.data.tokens import as_tokens
from fedlora_hf.errors import DataError
from fedlora_hf.util import say

ROW = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}


def prepared(folder: Path, data: Any, tokenizer: Any = None) -> ClientData:
    return prepare_client("ada", data, tokenizer, FederatedConfig(**models.options(folder)))


def rows(*changed: dict[str, Any]) -> datasets.Dataset:
    return datasets.Dataset.from_list([{**ROW, **changes} for changes in changed])


def test_padding_that_a_mask_leaves_out_is_no_token() -> None:
    """On either side, and as a tokenizer pads: with labels, too, that nothing would have told from others."""
    padded = rows(
        {"input_ids": [0, 0, 5, 6], "labels": [0, 0, -100, 6], "attention_mask": [0, 0, 1, 1]},
        {"input_ids": [5, 6, 7, 0], "labels": [-100, 6, 7, 0], "attention_mask": [1, 1, 1, 0]},
    )
    found = as_tokens(padded, "causal_lm").to_list()
    assert found == [{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]
    whole = as_tokens(rows({"attention_mask": [1, 1, 1]}), "causal_lm")
    assert whole.to_list() == [ROW]


def test_a_class_is_one_label_a_row() -> None:
    data = datasets.Dataset.from_list([{"input_ids": [5, 6], "labels": 1, "attention_mask": [1, 0]}])
    assert as_tokens(data, "sequence_classification").to_list() == [{"input_ids": [5], "labels": 1}]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (rows({}, {"labels": [1, 2]}), "example 2: 3 input_ids and 2 of labels; both must be as long"),
        (rows({"attention_mask": [1, 1]}), "example 1: 3 input_ids and 2 of attention_mask"),
        (rows({}, {"input_ids": [], "labels": []}), "example 2: has no input_ids; complete or remove it"),
        (rows({"attention_mask": [0, 0, 0]}), "example 1: its attention_mask leaves nothing"),
        (datasets.Dataset.from_list([{"input_ids": [1]}]), "columns input_ids: tokens without labels; add the column"),
        (datasets.Dataset.from_list([{"input_ids": [1], "labels": 1}]), "column labels: holds int64, and must hold a"),
        (rows({"labels": [-100, -100, -100]}), "none of its 1 training examples has a token to learn"),
        (rows({"labels": [5, -100, -100]}), "none of its 1 training examples has a token to learn"),
    ],
)
def test_rows_that_would_be_trained_otherwise_than_meant_are_refused(
    data: datasets.Dataset, said: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, data)
    assert str(caught.value).startswith(f"client 'ada': {said}")
    assert "\n" not in str(caught.value)


def test_rows_with_nothing_to_learn_are_counted_and_columns_without_a_use_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(say, "_SAID", set())
    data = prepared(tmp_path, rows({"token_type_ids": [0, 0, 0]}, {"labels": [6, -100, -100]}))
    assert (data.unlearned, len(data.train)) == (1, 2)
    assert caplog.messages == ["tokenised data: not used of its columns: token_type_ids"]


@pytest.mark.parametrize("kind", ["list", "table"])
def test_records_in_memory_are_what_a_dataset_of_them_is(kind: str, tmp_path: Path) -> None:
    records = [{"prompt": f"say {number}", "completion": "yes"} for number in range(3)]
    data = records if kind == "list" else pd.DataFrame(records, index=[7, 8, 9])
    tokenizer = models.tiny_tokenizer()
    found = prepared(tmp_path, data, tokenizer)
    assert list(found.train) == list(prepared(tmp_path, datasets.Dataset.from_list(records), tokenizer).train)
    split = prepared(tmp_path, {"train": data, "test": data}, tokenizer)
    assert split.test is not None
    assert len(split.test) == 3


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({1, 2}, "holds a set: must be a Dataset, a list of records, a DataFrame, a path or a Hub id"),
        ([1, 2], "record 1 is a int: must be {column: value}; convert it"),
        ([{"prompt": "a"}, {"prompt": ["b"]}], "its records do not make columns of one type"),
    ],
)
def test_what_is_no_data_is_one_line(data: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, data, models.tiny_tokenizer())
    assert str(caught.value).startswith(f"client 'ada': {said}")
    assert "\n" not in str(caught.value)
