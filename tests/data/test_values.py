"""Values become text in one place: missing, text, or one line that names record, column and remedy."""
# SPDX-License-Identifier: Apache-2.0

import datetime
import decimal
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_hf.data.formats import load_examples
from fedlora_hf.data.values import Row, as_text
from fedlora_hf.errors import DataError

plain = st.one_of(st.text(), st.integers(), st.booleans(), st.floats(allow_nan=False), st.dates())
nested = st.one_of(st.lists(st.text(), min_size=1), st.dictionaries(st.text(), st.integers(), min_size=1), st.binary())


@settings(deadline=None, database=None)
@given(value=plain)
def test_text_and_numbers_are_as_they_are(value: Any) -> None:
    assert as_text(value) == str(value)
    assert Row({"a": value}, 1).text("a") == str(value)


@pytest.mark.parametrize("value", [None, float("nan"), np.float64("nan"), decimal.Decimal("NaN")])
def test_nothing_is_missing(value: Any) -> None:
    assert as_text(value) is None
    with pytest.raises(DataError, match="record 7 has no 'a': every record needs one; complete or remove it"):
        Row({"a": value}, 7).text("a")


@settings(deadline=None, database=None)
@given(value=nested)
def test_what_is_nested_is_refused_in_one_line(value: Any) -> None:
    with pytest.raises(DataError) as caught:
        Row({"a": value}, 3).text("a")
    message = str(caught.value)
    assert message.startswith("record 3, column 'a': holds a ")
    assert "flatten it" in message
    assert "\n" not in message


def test_numbers_of_numpy_and_dates() -> None:
    assert as_text(np.int64(3)) == "3"
    assert as_text(datetime.date(2024, 2, 1)) == "2024-02-01"


def test_answers_of_a_list_keep_their_order_and_lose_what_is_missing() -> None:
    row = Row({"a": ["x", None, 2], "none": [], "all": [None], "gone": None}, 1)
    assert row.answers("a") == ["x", "2"]
    assert row.answers("none") == [""]
    assert row.answers("gone", optional=True) == []
    with pytest.raises(DataError, match="record 1 has no 'all'"):
        row.answers("all")


def test_a_nested_value_is_named_where_it_stands() -> None:
    rows = [{"question": "a", "answer": "b"}, {"question": "a", "answer": "c"}]
    rows[1]["answer"] = {"text": ["c"], "start": [0]}  # type: ignore[assignment]
    with pytest.raises(DataError, match=r"record 1, column 'answer': holds a dict .*flatten"):
        load_examples(datasets.Dataset.from_list([rows[1]]))


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"instruction": "Do.", "input": "It.", "response": "x"}, "Instruction:\nDo.\n\nInput:\nIt.\n\nAnswer:\n"),
        ({"instruction": "Do.", "context": "It.", "output": "x"}, "Instruction:\nDo.\n\nContext:\nIt.\n\nAnswer:\n"),
        (
            {"instruction": "Do.", "context": "C", "input": "I", "output": "x"},
            "Instruction:\nDo.\n\nContext:\nC\n\nInput:\nI\n\nAnswer:\n",
        ),
    ],
)
def test_second_fields_are_in_the_prompt(record: dict[str, Any], prompt: str) -> None:
    assert load_examples(datasets.Dataset.from_list([record]))[0]["prompt"] == prompt


def test_references_are_further_answers_and_unused_columns_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    record = {"question": "Why?", "answer": "So.", "references": ["So.", "Because."], "odd column of this test": 1}
    for _ in range(2):
        made = load_examples(datasets.Dataset.from_list([record]))
    assert made[0]["references"] == ["So.", "Because."]
    assert caplog.text.count("odd column of this test") == 1
