"""Reading one source of records: a file, a folder, a dataset of the Hub, or one in memory.

A record is a plain dict. What its columns mean is decided in `formats`; here they are only read.
"""
# SPDX-License-Identifier: Apache-2.0

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from fedlora_hf.data.files import SUFFIXES, Records, read_file, suffix_of
from fedlora_hf.data.values import Record
from fedlora_hf.errors import DataError, one_line
from fedlora_hf.launch.quiet import no_bars_in_logs
from fedlora_hf.util.say import say

# Of a stream without an end in sight, so many records are taken (our choice).
MAX_STREAMED = 100_000
_BATCH = 1000


class Table(NamedTuple):
    """What was read: records that can be gone through again, the columns that some of them have, and the class names
    of every column the source declares as a class label."""

    records: Iterable[Record]
    columns: list[str]
    class_names: dict[str, list[str]]


def read_table(
    source: Any, *, split: str | None = None, revision: str | None = None, records_at_most: int = MAX_STREAMED
) -> Table:
    """The records of `source`.

    source: a file (`files.SUFFIXES`); a folder of Natural Instructions task files (or one that holds such a folder as
        `tasks/`), or of other data files, read one after the other; a folder written by `Dataset.save_to_disk`;
        a dataset id of the Hub, `user/name` or `user/name:configuration`; a Dataset, a DatasetDict, or an
        IterableDataset, of which the first `records_at_most` are taken. No code of a dataset is run.
    split, revision: of a Hub dataset; the split is "train" unless told. A saved dataset and a DatasetDict may have
        splits too, a file or a folder of files has none.

    Raises DataError when there is nothing to read, or something that cannot be read.
    """
    if isinstance(source, datasets.Dataset | datasets.DatasetDict | datasets.IterableDataset):
        table, name = from_dataset(source, "in memory", split, records_at_most), "dataset in memory"
    else:
        table, name = _read_path(source, split, revision), f"dataset {str(source)!r}"
    if not table.columns:
        raise DataError(f"{name}: holds no records; a dataset needs at least one, check the file")
    return table


def _read_path(source: str | Path, split: str | None, revision: str | None) -> Table:
    path = Path(source).expanduser()
    _check_plain(path)
    if path.is_dir():
        return _read_folder(path, split)
    if path.is_file():
        return _table(read_file(path))
    if looks_local(str(source)):
        raise DataError(f"dataset {str(source)!r}: no such file or folder; check the path")
    return _read_hub(str(source), split, revision)


def _check_plain(path: Path) -> None:
    """DataError for a pipe, socket or device, or for a folder with one: it would be waited for, or read for ever."""
    for place in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if place.exists() and not place.is_dir() and not place.is_file():
            raise DataError(f"{place}: is no plain file; a dataset is read from files, copy the data into one")


def looks_local(source: str) -> bool:
    """Whether a name that is not there must have meant a file: a Hub id is `name` or `user/name`, without a suffix."""
    return not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", source) or source.endswith(SUFFIXES) or source[0] in ".~"


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder is one that `save_to_disk` wrote."""
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def task_files(path: Path) -> list[Path]:
    """The *.json files of a folder of Natural Instructions tasks (or of its `tasks/`), sorted; [] for any other."""
    files = sorted(path.glob("*.json")) or sorted((path / "tasks").glob("*.json"))
    return files if any(_is_task(file) for file in files) else []


def _is_task(path: Path) -> bool:
    """By its first characters, which name what a task file is: its instances come after, and may be many."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            head = file.read(20_000).lstrip()
    except OSError:
        return False
    return bool(re.search(r'"(Definition|Instances|task_name)"\s*:', head))


def data_files(path: Path) -> list[Path]:
    """The data files that lie in a folder itself, sorted by name; hidden ones are not looked at."""
    return sorted(file for file in path.iterdir() if file.is_file() and file.name[0] != "." and suffix_of(file))


def _table(records: Iterable[Record], class_names: dict[str, list[str]] | None = None) -> Table:
    columns: set[str] = set()
    for record in records:
        columns.update(record)
    return Table(records, sorted(columns), class_names or {})


def _read_folder(path: Path, split: str | None) -> Table:
    if is_saved_dataset(path):
        return from_dataset(datasets.load_from_disk(str(path)), str(path), split)
    if tasks := task_files(path):
        return _table([record for file in tasks for record in read_file(file) if "task_name" in record])
    files = data_files(path)
    if not files:
        raise DataError(
            f"{path}: a folder must hold Natural Instructions task files (*.json with Definition and Instances), "
            f"itself or in tasks/, or data files ({', '.join(SUFFIXES[:6])}); check the path"
        )
    parts = [read_file(file) for file in files]
    return _table(Records(lambda: itertools.chain.from_iterable(parts)))


def _read_hub(source: str, split: str | None, revision: str | None) -> Table:
    name, _, configuration = source.partition(":")
    try:
        with no_bars_in_logs():
            loaded = datasets.load_dataset(name, configuration or None, split=split, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"dataset {source!r}: neither a file or folder here nor a dataset the Hub gives ({one_line(error, 200)}); "
            "check the name, user/name[:configuration], and the connection"
        ) from error
    return from_dataset(loaded, source, split)


def from_dataset(loaded: Any, source: str, split: str | None = None, records_at_most: int = MAX_STREAMED) -> Table:
    """The records of a dataset of the library `datasets`; it stays where it is, in memory or mapped from the disk."""
    if isinstance(loaded, datasets.DatasetDict | datasets.IterableDatasetDict):
        wanted = split or "train"
        if wanted not in loaded:
            raise DataError(f"dataset {source!r}: has no split {wanted!r}; name one of {', '.join(loaded)}")
        loaded = loaded[wanted]
    if isinstance(loaded, datasets.IterableDataset):
        taken = list(itertools.islice(loaded, records_at_most + 1))
        if len(taken) > records_at_most:
            say(f"dataset {source!r}: a stream; its first {records_at_most} records are taken, the rest is not read")
        return _table(taken[:records_at_most], class_names(loaded))
    bare = loaded.with_format(None)
    return Table(Records(lambda: _rows(bare)), sorted(bare.column_names) if len(bare) else [], class_names(bare))


def _rows(dataset: datasets.Dataset) -> Iterator[Record]:
    for start in range(0, len(dataset), _BATCH):
        batch = dataset[start : start + _BATCH]
        yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def class_names(dataset: Any) -> dict[str, list[str]]:
    """{column: class names} of the columns that a dataset declares as class labels."""
    kinds = dataset.features or {}
    labelled = {name: kind for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)}
    return {name: list(kind.names) for name, kind in labelled.items()}
