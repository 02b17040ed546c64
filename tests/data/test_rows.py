"""Rows in memory are the dataset's rows."""
# SPDX-License-Identifier: Apache-2.0

import datasets
import pytest

from fedlora_hf.data.rows import TokenRows


@pytest.mark.parametrize("labels", [[[-100, 2], [4], [-100, -100, 7]], [0, 2, 1]], ids=["tokens", "classes"])
def test_rows_are_those_of_the_dataset(labels):
    dataset = datasets.Dataset.from_dict({"input_ids": [[1, 2], [4], [5, 6, 70000]], "labels": labels})
    rows = TokenRows(dataset)
    assert len(rows) == 3
    assert list(rows) == dataset.to_list()
    with pytest.raises(IndexError):
        rows[3]
