"""Reading one data file: records one after the other, from text or Parquet, compressed or not, refused by line.

What cannot be read is refused with the file and, where there is one, the line. A file of records a line (JSON Lines,
CSV) is gone through as often as needed and never held as a whole.
"""
# SPDX-License-Identifier: Apache-2.0

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from fedlora_hf.data.values import Record
from fedlora_hf.errors import DataError, one_line

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
SUFFIXES = (*FORMATS, *(f"{suffix}.gz" for suffix in FORMATS if suffix != ".parquet"))
_BATCH = 4096
_LONGEST = 2**31 - 1
# By their first bytes: what Windows and spreadsheets write when told "Unicode".
_MARKS = ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


class Records(Iterable[Record]):
    """Records that can be gone through again and again; what opens them is called anew each time."""

    def __init__(self, opened: Callable[[], Iterator[Record]]) -> None:
        self._opened = opened

    def __iter__(self) -> Iterator[Record]:
        return self._opened()


def suffix_of(path: Path) -> str | None:
    """Which of SUFFIXES a file's name ends with, None for none of them; case does not count."""
    return max((s for s in SUFFIXES if path.name.lower().endswith(s)), key=len, default=None)


def stem_of(path: Path) -> str:
    """The file's name without the suffix."""
    return path.name[: len(path.name) - len(suffix_of(path) or path.suffix)]


def read_file(path: Path) -> Iterable[Record]:
    """The records of one file. Raises DataError, sooner or while they are gone through."""
    suffix = suffix_of(path)
    if suffix is None:
        raise DataError(f"{path}: a data file must end with {', '.join(FORMATS)} (or .gz); convert or rename it")
    kind = suffix.removesuffix(".gz")
    if kind == ".parquet":
        return Records(lambda: _parquet(path))
    if kind in (".csv", ".tsv"):
        return Records(lambda: _guarded(path, _csv_records(path, "\t" if kind == ".tsv" else ",")))
    if kind in (".jsonl", ".ndjson"):
        return Records(lambda: _guarded(path, _json_lines(path)))
    return list(_guarded(path, _json_records(path)))


def _open(path: Path) -> IO[str]:
    """The file as text, whatever its compression and byte order."""
    raw: Any = (gzip.open if path.name.lower().endswith(".gz") else open)(path, "rb")
    start = raw.read(2)
    raw.seek(0)
    return io.TextIOWrapper(raw, encoding=next((name for mark, name in _MARKS if start == mark), "utf-8-sig"))


def _guarded(path: Path, records: Iterator[Record]) -> Iterator[Record]:
    """The records; a file that is no text is refused with the byte where it stops being one."""
    try:
        yield from records
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {_bad_byte(path, error)} is not UTF-8; convert the file to UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({one_line(error, 80)}); check the file") from None


def _bad_byte(path: Path, error: UnicodeDecodeError) -> int:
    """Its place in the whole file: a reader that goes piece by piece counts from the start of the piece."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.name.lower().endswith(".gz") else path.read_bytes()
        data.decode(error.encoding if error.encoding.startswith("utf-16") else "utf-8")
    except UnicodeDecodeError as whole:
        return whole.start
    return error.start


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH):
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: {one_line(error, 200)}; it must be a Parquet file, write it again") from error


def _csv_records(path: Path, delimiter: str) -> Iterator[Record]:
    with _open(path) as text:
        reader = csv.DictReader(text, strict=True, delimiter=delimiter)
        while True:
            # The module's limit is every reader's, so it is lifted for one record at a time.
            usual = csv.field_size_limit(_LONGEST)
            try:
                record = next(reader, None)
            except csv.Error as error:
                raise DataError(
                    f"{path}, line {reader.reader.line_num}: {error}; it must be valid CSV, correct the line"
                ) from error
            finally:
                csv.field_size_limit(usual)
            if record is None:
                return
            if None in record or None in record.values():
                raise DataError(
                    f"{path}, line {reader.line_num}: every row must have the {len(reader.fieldnames or [])} fields "
                    "of the header; quote fields that hold commas or line breaks"
                )
            yield record


def _json_lines(path: Path) -> Iterator[Record]:
    # Not splitlines(): a JSON string may hold U+2028 and its like, which are no line breaks to JSON.
    with _open(path) as text:
        for number, line in enumerate(text, start=1):
            if line.strip():
                yield _line(line, f"{path}, line {number}")


def _line(line: str, where: str) -> Record:
    try:
        record = json.loads(line, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: {error.msg} at column {error.colno}; every line must be one JSON object, correct or remove the "
            "line"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {one_line(error, 80)}; correct or remove the line") from None
    return _as_object(record, where)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError for a name that stands twice, of which json would take the second."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice in one object")
    return found


def _json_records(path: Path) -> Iterator[Record]:
    yield from _json_content(path)


def _json_content(path: Path) -> Iterable[Record]:
    """The records of a .json file: a list of objects, a table of columns, one Natural Instructions task, or JSON Lines
    by another name."""
    with _open(path) as file:
        text = file.read()
    try:
        content = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return Records(lambda: _json_lines(path))
        where = f"{path}, line {error.lineno}"
        raise DataError(f"{where}: {error.msg} at column {error.colno}; it must be valid JSON, correct it") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {one_line(error, 80)}; it must be a list of objects, correct it") from None
    if isinstance(content, dict) and "Instances" in content:
        return _task_records(content, path)
    if isinstance(content, dict) and (columns := _columns(content)) is not None:
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    items = content if isinstance(content, list) else [content]
    return [_as_object(item, f"{path}, record {number}") for number, item in enumerate(items, start=1)]


def _columns(content: dict[str, Any]) -> dict[str, list[Any]] | None:
    """{column: its values} of an object that is a table, as pandas' to_json and Dataset.to_dict write it; None for one
    that is a record. All columns are lists of one length, or objects of the same keys (the index); a list of turns is
    a value of a record."""
    values = list(content.values())
    if not values:
        return None
    if all(isinstance(value, dict) for value in values):
        index = list(values[0])
        same = all(value.keys() == values[0].keys() for value in values)
        return {name: [value[key] for key in index] for name, value in content.items()} if same and index else None
    if not all(isinstance(value, list) and len(value) == len(values[0]) for value in values):
        return None
    turns = any(isinstance(item, dict) and ("role" in item or "from" in item) for value in values for item in value)
    return None if turns else content


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
            "task_name": stem_of(path),
            "definition": texts[0],
            "inputs": instance["input"],
            "targets": instance["output"],
        }
