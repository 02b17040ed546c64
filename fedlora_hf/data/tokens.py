"""Examples that came as tokens: which of their columns count, and what every row of them must be."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fedlora_hf.data.mapped import quiet
from fedlora_hf.errors import DataError
from fedlora_hf.util.say import say

# What a tokenizer adds that a batch gets anew, or that has no meaning for one example.
_MADE_ANEW = {"length", "special_tokens_mask", "overflow_to_sample_mapping"}
_BATCH = 10_000


def as_tokens(examples: datasets.Dataset, task: str) -> datasets.Dataset:
    """input_ids and labels of a tokenised dataset, without the tokens that its attention_mask leaves out.

    task: "causal_lm" wants a label a token, "sequence_classification" one a row. Other columns are said to be unused.
    Raises DataError for rows that a batch could not be made of, or that would be trained on shifted labels.
    """
    columns = set(examples.column_names)
    if "labels" not in columns:
        raise DataError(
            "columns "
            + ", ".join(sorted(columns))
            + ": tokens without labels; add the column labels"
            + (", the ids again and -100 where nothing is to be learned" if task == "causal_lm" else "")
        )
    if unused := sorted(columns - {"input_ids", "labels", "attention_mask"} - _MADE_ANEW):
        say(f"tokenised data: not used of its columns: {', '.join(unused)}")
    wanted = [name for name in ("input_ids", "labels", "attention_mask") if name in columns]
    kept = examples.select_columns(wanted)
    lists = [name for name in wanted if name != "labels" or task == "causal_lm"]
    masked = False
    for first, table in _tables(kept):
        lengths = {name: _lengths(table[name], name, first) for name in lists}
        for name, found in lengths.items():
            if (odd := np.flatnonzero(found != lengths["input_ids"])).size:
                raise DataError(
                    f"example {first + odd[0] + 1}: {lengths['input_ids'][odd[0]]} input_ids and {found[odd[0]]} of "
                    f"{name}; both must be as long"
                )
        if "attention_mask" in lists:
            masked |= not pc.list_flatten(table["attention_mask"]).to_numpy().astype(bool).all()
    if masked:
        with quiet():
            kept = kept.map(_unmasked, with_indices=True, fn_kwargs={"names": lists})
    return kept.select_columns(["input_ids", "labels"])


def _tables(examples: datasets.Dataset) -> Iterator[tuple[int, pa.Table]]:
    """(number of the first row from 0, so many rows as they are stored): no list of Python's is made of them."""
    stored = examples.with_format("arrow")
    for start in range(0, len(stored), _BATCH):
        yield start, stored[start : start + _BATCH]


def _lengths(column: pa.ChunkedArray, name: str, first: int) -> Any:
    """Of each row's list; `first` is the number of the first row from 0."""
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise DataError(f"column {name}: holds {kind}, and must hold a list of whole numbers in every row")
    found = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    if (empty := np.flatnonzero(found == 0)).size:
        raise DataError(f"example {first + empty[0] + 1}: has no {name}; complete or remove it")
    return found


def _unmasked(row: dict[str, Any], number: int, names: list[str]) -> dict[str, Any]:
    """A row without the tokens whose mask is 0: padding that somebody put there."""
    kept = [place for place, bit in enumerate(row["attention_mask"]) if bit]
    if not kept:
        raise DataError(f"example {number + 1}: its attention_mask leaves nothing; complete or remove it")
    return {name: [row[name][place] for place in kept] for name in names}
