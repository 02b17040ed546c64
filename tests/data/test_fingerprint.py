"""The checksum of a run's examples: the same for the same tokens, another for anything that training would see."""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import datasets
import pytest

from fedlora_hf.data.fingerprint import data_sha256
from fedlora_hf.data.prepare import ClientData
from fedlora_hf.data.rows import TokenRows


def table(*rows: list[int], labels: list[Any] | None = None) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"input_ids": list(rows), "labels": labels or [list(row) for row in rows]})


def client(*rows: list[int], labels: list[Any] | None = None, test: Any = None) -> ClientData:
    return ClientData(TokenRows(table(*rows, labels=labels)), test=test)


BASE = {"a": client([1, 2], [3]), "b": client([4, 5])}


def test_the_order_of_clients_does_not_matter() -> None:
    assert data_sha256(BASE) == data_sha256(dict(reversed(BASE.items())))


@pytest.mark.parametrize(
    "other",
    [
        {"a": client([1, 2], [3]), "b": client([4, 6])},
        {"a": client([1, 2], [3]), "c": client([4, 5])},
        {"a": client([1], [2, 3]), "b": client([4, 5])},
        {"a": client([3], [1, 2]), "b": client([4, 5])},
        {"a": client([1, 2]), "b": client([3], [4, 5])},
        {"a": client([1, 2], [3], labels=[[1, 2], [-100]]), "b": client([4, 5])},
        {"a": client([1, 2], [3], labels=[0, 1]), "b": client([4, 5])},
        {"a": client([1, 2], [3], test=table([7])), "b": client([4, 5])},
    ],
    ids=["token", "name", "boundary", "order", "moved", "label", "classes", "test"],
)
def test_whatever_training_or_scoring_would_see_changes_it(other: dict[str, ClientData]) -> None:
    assert data_sha256(other) != data_sha256(BASE)


def test_a_table_of_many_rows_is_read_in_blocks_to_the_same_sum() -> None:
    rows = [[number % 7, number % 11] for number in range(2500)]
    first = data_sha256({"a": client([1], test=table(*rows))})
    assert first == data_sha256({"a": client([1], test=table(*rows))})
    rows[-1] = [0, 0]
    assert first != data_sha256({"a": client([1], test=table(*rows))})
