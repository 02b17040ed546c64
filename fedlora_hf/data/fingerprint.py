"""One number that says which tokenised examples a run was trained on: a resumed run must have the same."""
# SPDX-License-Identifier: Apache-2.0

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fedlora_hf.data.packing import PackedRows
from fedlora_hf.data.prepare import ClientData
from fedlora_hf.data.rows import TokenRows

_ROWS = 1024  # of a table, hashed at once


def data_sha256(clients: Mapping[str, ClientData]) -> str:
    """sha256 over every client's id, tokens and labels, of all its splits; in hexadecimal.

    Ids are sorted, lengths are part of it: neither a row moved to another client nor a boundary moved goes unseen.
    """
    found = hashlib.sha256()
    for client_id in sorted(clients):
        data = clients[client_id]
        for split in (data.train, data.validation, data.test):
            found.update(f"{client_id!r} {0 if split is None else len(split)}\n".encode())
            for block in _blocks(split):
                found.update(block)
    return found.hexdigest()


def _blocks(split: Any) -> Iterator[bytes]:
    """The bytes of a split's tokens and labels, whatever it is kept as; of packed rows, those of the examples."""
    if isinstance(split, PackedRows):
        split = split.rows
    if isinstance(split, TokenRows):
        yield from split.blocks()
        return
    for first in range(0, 0 if split is None else len(split), _ROWS):
        rows = split[first : first + _ROWS]
        for name in ("input_ids", "labels"):
            for row in rows[name]:
                values = np.asarray(row)
                kind = values.dtype.kind if values.dtype.kind == "f" else "i"
                yield np.int64(values.size).tobytes()
                yield values.astype(np.float64 if kind == "f" else np.int64).tobytes()
