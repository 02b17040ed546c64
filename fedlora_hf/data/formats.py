"""Instruction formats: records of any recognised schema become examples with one set of columns.

Causal LM examples have `prompt`, `completion`, `references` (the accepted answers, the completion first) and `group`
(Dolly's category, the Natural Instructions task, "" if none). Classification examples have `text`, `label` (a class
label that keeps its names) and `group`. Both have `client` where the source names clients. Examples that are chats
have `chat`: the turns as JSON, for a chat template to word; prompt and completion are our own wording of them, which
`schemas` describes.
"""
# SPDX-License-Identifier: Apache-2.0

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
from datasets.fingerprint import Hasher

from fedlora_hf.data.labels import class_order, label_of
from fedlora_hf.data.mapped import quiet_map
from fedlora_hf.data.schemas import Schema, choose_column, choose_schema, render_prompt
from fedlora_hf.data.sources import MAX_STREAMED, Table, read_table
from fedlora_hf.data.values import Record, Row
from fedlora_hf.errors import ConfigError, DataError
from fedlora_hf.util.say import say

__all__ = ["TASKS", "load_examples", "render_prompt"]

TASKS = ("causal_lm", "sequence_classification")
GROUP_COLUMNS = ("category", "task", "task_name", "group")
TEXT_COLUMNS = ("text", "instruction")
LABEL_COLUMNS = ("label", "category")
CLIENT_COLUMN = "client"
# Records that are worded at a time: what is not text yet takes ten times the memory.
_CHUNK = 10_000
_TEXT = datasets.Value("string")
_CAUSAL = {"prompt": _TEXT, "completion": _TEXT, "references": datasets.List(_TEXT)}


@dataclass(frozen=True)
class Reading:
    """Which columns mean what, and so how records become columns of examples."""

    schema: Schema | None
    columns: dict[str, str]
    class_names: dict[str, list[str]]
    turns: bool

    def features(self) -> datasets.Features:
        """The columns of the examples; a label is a text here still, and numbered when all are known."""
        own: dict[str, Any] = {"text": _TEXT, "label": _TEXT} if self.schema is None else dict(_CAUSAL)
        if self.turns:
            own["chat"] = _TEXT
        own |= {name: _TEXT for name in ("group", "client") if name in self.columns}
        return datasets.Features(own)

    def worded(self, records: Sequence[Record], start: int) -> dict[str, list[Any]]:
        """The columns of so many examples, whose first is record number `start` + 1."""
        made: dict[str, list[Any]] = {name: [] for name in self.features()}
        for number, record in enumerate(records, start=start + 1):
            for name, value in self._example(record, number).items():
                made[name].append(value)
        return made

    def _example(self, record: Record, number: int) -> dict[str, Any]:
        if self.schema is None:
            row = Row(record, number)
            label = self.columns["label"]
            found: dict[str, Any] = {"text": self._name(row, self.columns["text"])}
            found["label"] = label_of(row, label, self.class_names.get(label))
        else:
            needs = f"every record of the schema {self.schema.name} needs {', '.join(self.schema.needs)}"
            row = Row(record, number, needs)
            said = self.schema.convert(row)
            found = {"prompt": said.prompt, "completion": said.answers[0], "references": said.answers}
            if self.turns:
                found["chat"] = json.dumps(said.chat, ensure_ascii=False) if said.chat else ""
        if "group" in self.columns:
            group = self.columns["group"]
            found["group"] = "" if group == "" else self._name(row, group, missing="")
        if "client" in self.columns:
            found["client"] = self._name(row, self.columns["client"])
        return found

    def _name(self, row: Row, column: str, missing: str | None = None) -> str:
        """A category, a client, a text: of a list its first item, of a class label its name."""
        value, names = row.record.get(column), self.class_names.get(column)
        if names is not None and isinstance(value, int):
            value = names[value] if 0 <= value < len(names) else None
            row = Row({column: value}, row.number)
        text = row.first(column)
        if text is None and missing is None:
            raise DataError(
                f"record {row.number} has no value in {column!r}: every record needs one; complete or remove it"
            )
        return str(missing) if text is None else text


def load_examples(
    source: Any,
    *,
    task: str = "causal_lm",
    split: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    labels: Sequence[str] | None = None,
    head: Sequence[str] | None = None,
    client_column: str | None = None,
    revision: str | None = None,
    turns: bool = False,
    records_at_most: int = MAX_STREAMED,
) -> datasets.Dataset:
    """The examples of `source`, in the order of the source, nothing removed.

    source: whatever `sources.read_table` reads: a file, a folder, a Hub id, a Dataset, DatasetDict or
        IterableDataset. Examples of a Dataset that lies on the disk stay there, in the cache of `datasets`.
    task: "causal_lm" or "sequence_classification".
    text_column, label_column: for classification, the text and its class (by default text or instruction, label or
        category). For a causal LM they name a prompt and its completion where the columns are of no recognised schema.
    labels: the classes of a classification in order; these data may lack some, and have no other. Default: those of
        the base's `head` where it knows all of them, else those the source declares, else those it has, sorted.
    client_column: the column that says whose record it is; "client" where there is one.
    turns: keep instructions as turns too (`chat`), so that a chat template words them; chats are always kept so.

    Raises DataError for a source that cannot be read, columns that are not recognised, a record without a needed
    value or with one that is no text, or a single class; ConfigError for an unknown task.
    """
    table, examples = read_examples(
        source,
        task=task,
        split=split,
        text_column=text_column,
        label_column=label_column,
        client_column=client_column,
        revision=revision,
        turns=turns,
        records_at_most=records_at_most,
    )
    if task == "causal_lm":
        return examples
    column = choose_column(label_column, LABEL_COLUMNS, table.columns, "label_column")
    return numbered([examples], column, wanted=labels, declared=table.class_names.get(column), head=head)[0]


def read_examples(
    source: Any,
    *,
    task: str = "causal_lm",
    text_column: str | None = None,
    label_column: str | None = None,
    client_column: str | None = None,
    turns: bool = False,
    **reading: Any,
) -> tuple[Table, datasets.Dataset]:
    """(what was read, its examples); as `load_examples`, with the labels of a classification still texts."""
    if task not in TASKS:
        raise ConfigError(f"task {task!r}: must be one of {', '.join(TASKS)}; choose one")
    table = read_table(source, **reading)
    columns, schema = table.columns, None
    chosen: dict[str, str] = {}
    if task == "causal_lm":
        schema = choose_schema(columns, text_column, label_column)
        used = {*schema.needs, *schema.reads}
    else:
        chosen["text"] = choose_column(text_column, TEXT_COLUMNS, columns, "text_column")
        chosen["label"] = choose_column(label_column, LABEL_COLUMNS, columns, "label_column")
        used = set(chosen.values())
    chosen["group"] = next((name for name in GROUP_COLUMNS if name in columns), "")
    if client_column is not None or CLIENT_COLUMN in columns:
        chosen["client"] = choose_column(client_column, (CLIENT_COLUMN,), columns, "client_column")
    if unused := sorted(set(columns) - used - set(chosen.values()) - {"chat"}):
        name = source if isinstance(source, str | Path) else "in memory"
        say(f"dataset {str(name)!r}: not used of its columns: {', '.join(unused)}")
    keep = schema is not None and (turns or schema.is_chat)
    read = Reading(schema, chosen, table.class_names, keep)
    examples = _on_disk(source, read) if _lies_on_disk(source) else _in_memory(table, read)
    if keep and not turns and not any(examples["chat"][:]):
        examples = examples.remove_columns("chat")
    return table, examples


def numbered(
    parts: Sequence[datasets.Dataset],
    column: str,
    *,
    wanted: Sequence[str] | None = None,
    declared: Sequence[str] | None = None,
    head: Sequence[str] | None = None,
) -> list[datasets.Dataset]:
    """The parts with their labels numbered alike, in the order of `labels.class_order`."""
    values = [part["label"][:] for part in parts]
    ordered = class_order(column, list(chain.from_iterable(values)), wanted=wanted, declared=declared, head=head)
    index = {name: position for position, name in enumerate(ordered)}
    made = []
    for part, texts in zip(parts, values, strict=True):
        features = datasets.Features({**part.features, "label": datasets.ClassLabel(names=ordered)})
        columns = {name: part[name][:] for name in part.column_names}
        columns["label"] = [index[value] for value in texts]
        made.append(datasets.Dataset.from_dict(columns, features=features))
    return made


def _in_memory(table: Table, read: Reading) -> datasets.Dataset:
    features, parts = read.features(), []
    for start, records in _chunks(iter(table.records)):
        parts.append(datasets.Dataset.from_dict(read.worded(records, start), features=features))
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _chunks(records: Iterator[Record]) -> Iterator[tuple[int, list[Record]]]:
    start = 0
    while chunk := list(islice(records, _CHUNK)):
        yield start, chunk
        start += len(chunk)


def _lies_on_disk(source: Any) -> bool:
    return isinstance(source, datasets.Dataset) and bool(source.cache_files)


def _on_disk(source: datasets.Dataset, read: Reading) -> datasets.Dataset:
    """By `Dataset.map`: what was worded before is taken from the cache, and neither is held in memory."""

    def worded(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        return read.worded(rows, indices[0])

    what = (source._fingerprint, _WORDING, read.schema and read.schema.name, read.columns, read.class_names, read.turns)
    return quiet_map(source.with_format(None), worded, read.features(), Hasher.hash(what), with_indices=True)


# Part of the cache's key: another number when the wording of any schema changes.
_WORDING = 1
