"""Classes of a classification: what may be a label, in which order classes are numbered, and how many each has."""
# SPDX-License-Identifier: Apache-2.0

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from fedlora_hf.data.values import Row, is_missing
from fedlora_hf.errors import DataError, one_line


def label_of(row: Row, column: str, names: Sequence[str] | None) -> str:
    """The name of a record's class. names: those of a column that the source declares as a class label.

    A whole number is its digits, also where a table holds it as 1.0. Raises DataError for a list of several (many
    labels an example) and a fraction (regression), neither of which is supported.
    """
    value = row.record.get(column)
    if isinstance(value, list | tuple):
        if len(value) > 1:
            raise DataError(
                f"record {row.number}, label column {column!r}: holds {len(value)} labels, and several labels an "
                "example are not supported; give every example one class, or train a causal LM"
            )
        value = value[0] if value else None
    if isinstance(value, float) and not is_missing(value):
        if not value.is_integer():
            raise DataError(
                f"record {row.number}, label column {column!r}: {value} is no class, and regression is not supported; "
                "make classes of the values, or name another column with label_column"
            )
        value = int(value)
    if names is not None and isinstance(value, int):
        value = names[value] if 0 <= value < len(names) else None
    return Row({column: value}, row.number, row.needs).text(column)


def class_order(
    column: str,
    values: Sequence[str],
    *,
    wanted: Sequence[str] | None = None,
    declared: Sequence[str] | None = None,
    head: Sequence[str] | None = None,
) -> list[str]:
    """The classes in the order of their numbers.

    `wanted` (the option `labels`) where given; else those of the base's `head`, where it knows all that the data
    have; else as the source declares them; else those the data have, sorted (whole numbers by value).
    """
    present = set(values)
    if wanted is not None and (odd := sorted(present - set(wanted))):
        raise DataError(
            f"label column {column!r}: holds {odd[0]!r}, which is none of labels={','.join(wanted)}; name it there, or "
            "correct the records"
        )
    if wanted is not None:
        return list(wanted)
    if len(present) < 2:
        raise DataError(
            f"label column {column!r}: holds the one class {values[0]!r}, and a classifier needs at least two; "
            "name another with label_column, or train a causal LM"
        )
    if head is not None and present <= set(head):
        return list(head)
    return list(declared or sorted(present, key=_by_value))


def _by_value(value: str) -> tuple[bool, int, str]:
    """Whole numbers by value, then everything else by the alphabet."""
    number = value.removeprefix("-").isdecimal()
    return not number, int(value) if number else 0, value


def head_labels(config: Any) -> list[str] | None:
    """The classes of a base's head by number, where it knows them by name; None for LABEL_0, LABEL_1 and the like."""
    known: Mapping[Any, Any] = getattr(config, "id2label", None) or {}
    try:
        ordered = [str(known[number]) for number in range(len(known))]
    except KeyError:
        return None
    named = ordered and len(set(ordered)) == len(ordered) and ordered != [f"LABEL_{n}" for n in range(len(ordered))]
    return ordered if named else None


def with_labels(record: Mapping[str, Any], model: Any, task: str) -> dict[str, Any]:
    """Facts for the run record with, among those on the model, a classifier's classes in the order of their numbers."""
    named: Mapping[Any, Any] = getattr(getattr(model, "config", None), "id2label", None) or {}
    facts = dict(record.get("model", {}))
    if task != "sequence_classification" or "labels" in facts or set(named) != set(range(len(named))):
        return dict(record)
    return {**record, "model": {**facts, "labels": [str(named[number]) for number in range(len(named))]}}


def class_counts(examples: datasets.Dataset) -> dict[str, int]:
    """{class: examples that have it}, in the order of the classes."""
    names = examples.features["label"].names
    counts = Counter(examples["label"][:])
    return {name: counts[number] for number, name in enumerate(names)}


def imbalance(counts: Mapping[str, int]) -> str | None:
    """One line on classes of very different size (the largest ten times the smallest, our choice) or without example;
    None where there is nothing to say."""
    if not counts or max(counts.values()) < 10 * min(counts.values()):
        return None
    few, many = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    share = counts[many] / sum(counts.values())
    return (
        f"classes are uneven: {one_line(many, 40)!r} has {counts[many]} examples ({share:.0%}), {one_line(few, 40)!r} "
        f"{counts[few]}; always saying the first is right so often"
    )
