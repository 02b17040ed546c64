"""Reading records: local files, folders of Natural Instructions tasks, saved datasets, and datasets of the Hub.

A record is a plain dict. What its columns mean is decided in `formats`; here they are only read, and what cannot be
read is refused with the file and, where there is one, the line.
"""
# SPDX-License-Identifier: Apache-2.0

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import datasets

from fedlora_hf.errors import DataError
from fedlora_hf.util.disk import open_regular

Record = Mapping[str, object]
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


class Table(NamedTuple):
    """What was read: the records, and the class names of every column the source declares as a class label."""

    records: list[Record]
    class_names: dict[str, list[str]]


def read_table(source: str | Path, *, split: str | None = None, revision: str | None = None) -> Table:
    """The records of `source`.

    source: a .jsonl, .json, .csv or .parquet file; a folder of Natural Instructions task files (or one that holds
        such a folder as `tasks/`); a folder written by `Dataset.save_to_disk`; otherwise a dataset id of the Hub,
        `user/name` or `user/name:configuration`. No code of a dataset is run.
    split, revision: of a Hub dataset; the split is "train" unless told. A saved dataset may have splits too, a file
        or a folder of tasks has none.

    Raises DataError when there is nothing to read, or something that cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        _check_plain(path)
        table = _read_folder(path, split)
    elif path.exists():
        _check_plain(path)
        table = Table(_read_file(path), {})
    elif _looks_local(str(source)):
        raise DataError(f"dataset {str(source)!r}: no such file or folder; check the path")
    else:
        table = _read_hub(str(source), split, revision)
    if not table.records:
        raise DataError(f"dataset {str(source)!r}: holds no records; a dataset needs at least one, check the file")
    return table


def _check_plain(path: Path) -> None:
    """DataError for a pipe, socket or device, or for a folder with one: it would be waited for, or read for ever."""
    for place in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if place.exists() and not place.is_dir() and not place.is_file():
            raise DataError(f"{place}: is no plain file; a dataset is read from files, copy the data into one")


def _looks_local(source: str) -> bool:
    """Whether a name that is not there must have meant a file: a Hub id is `name` or `user/name`, without a suffix."""
    return not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", source) or source.endswith(SUFFIXES) or source[0] in ".~"


def _read_file(path: Path) -> list[Record]:
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: a data file must end with {', '.join(SUFFIXES)}; convert or rename it")
    try:
        if path.suffix == ".parquet":
            return _read_parquet(path)
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from error
    if path.suffix == ".csv":
        return list(_csv_records(text, path))
    return list(_json_lines(text, path)) if path.suffix == ".jsonl" else _json_records(text, path)


def _read_parquet(path: Path) -> list[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path).to_pylist()
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: {_one_line(error)}; it must be a Parquet file, write it again") from error


def _csv_records(text: str, path: Path) -> Iterator[Record]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for record in reader:
            if None in record or None in record.values():
                raise DataError(
                    f"{path}, line {reader.line_num}: every row must have the {len(reader.fieldnames or [])} fields "
                    "of the header; quote fields that hold commas or line breaks"
                )
            yield record
    except csv.Error as error:
        line = reader.reader.line_num
        raise DataError(f"{path}, line {line}: {error}; it must be valid CSV, correct the line") from error


def _json_lines(text: str, path: Path) -> Iterator[Record]:
    # Not splitlines(): a JSON string may hold U+2028 and its like, which are no line breaks to JSON.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: {error.msg} at column {error.colno}; every line must be one JSON object, "
                    "correct or remove the line"
                ) from error
            yield _as_object(record, f"{path}, line {number}")


def _json_records(text: str, path: Path) -> list[Record]:
    """The records of a .json file: a list of objects, one Natural Instructions task, or JSON Lines by another name."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return list(_json_lines(text, path))
        where = f"{path}, line {error.lineno}"
        raise DataError(f"{where}: {error.msg} at column {error.colno}; it must be valid JSON, correct it") from error
    if isinstance(content, dict) and "Instances" in content:
        return list(_task_records(content, path))
    items = content if isinstance(content, list) else [content]
    return [_as_object(item, f"{path}, record {number}") for number, item in enumerate(items, start=1)]


def _as_object(value: object, where: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{where}: {str(value)[:40]!r} is not a JSON object; every record must be one, correct it")
    return value


def _task_records(task: Record, path: Path) -> Iterator[Record]:
    """One record an instance of an upstream task file; the columns are those of the collection's flat form.

    The definition is the first where a task has several; `targets` is the list of all accepted answers.
    """
    rule = "a task file has Definition (a text or list) and Instances with input and output; take it from upstream anew"
    definition = task.get("Definition")
    texts = definition if isinstance(definition, list) else [definition]
    instances = task["Instances"]
    if not texts or not isinstance(texts[0], str) or not isinstance(instances, list):
        raise DataError(f"{path}: {rule}")
    for number, instance in enumerate(instances, start=1):
        if not isinstance(instance, dict) or "input" not in instance or "output" not in instance:
            raise DataError(f"{path}, instance {number}: {rule}")
        yield {
            "task_name": path.stem,
            "definition": texts[0],
            "inputs": instance["input"],
            "targets": instance["output"],
        }


def _read_folder(path: Path, split: str | None) -> Table:
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return _from_dataset(datasets.load_from_disk(str(path)), str(path), split)
    files = sorted(path.glob("*.json")) or sorted((path / "tasks").glob("*.json"))
    records = [record for file in files for record in _read_file(file) if "task_name" in record]
    if not records:
        raise DataError(
            f"{path}: a folder must hold Natural Instructions task files (*.json with Definition and Instances), "
            "itself or in tasks/; name a single file for any other format"
        )
    return Table(records, {})


def _read_hub(source: str, split: str | None, revision: str | None) -> Table:
    name, _, configuration = source.partition(":")
    try:
        loaded = datasets.load_dataset(name, configuration or None, split=split, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"dataset {source!r}: neither a file or folder here nor a dataset the Hub gives ({_one_line(error)}); "
            "check the name, user/name[:configuration], and the connection"
        ) from error
    return _from_dataset(loaded, source, split)


def _from_dataset(loaded: datasets.Dataset | datasets.DatasetDict, source: str, split: str | None) -> Table:
    if isinstance(loaded, datasets.DatasetDict):
        wanted = split or "train"
        if wanted not in loaded:
            raise DataError(f"dataset {source!r}: has no split {wanted!r}; name one of {', '.join(loaded)}")
        loaded = loaded[wanted]
    return Table(loaded.to_list(), class_names(loaded))


def class_names(dataset: datasets.Dataset) -> dict[str, list[str]]:
    """{column: class names} of the columns that a dataset declares as class labels."""
    labelled = {name: kind for name, kind in dataset.features.items() if isinstance(kind, datasets.ClassLabel)}
    return {name: list(kind.names) for name, kind in labelled.items()}


def column_names(records: Iterable[Record]) -> list[str]:
    """Every column that some record has, sorted."""
    return sorted({name for record in records for name in record})


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
