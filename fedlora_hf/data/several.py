"""Several sources are several clients: files, folders, globs, Hub ids or a mapping, each under its own name."""
# SPDX-License-Identifier: Apache-2.0

import glob
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import yaml

from fedlora_hf.data.files import stem_of, suffix_of
from fedlora_hf.data.formats import LABEL_COLUMNS, numbered, read_examples
from fedlora_hf.data.schemas import choose_column
from fedlora_hf.data.sources import data_files, is_saved_dataset, task_files
from fedlora_hf.errors import DataError, one_line
from fedlora_hf.util.names import telling_names

SPLITS = {
    "train": "train",
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    "test": "test",
}
_SPLIT_FILE = re.compile(rf"({'|'.join(SPLITS)})(?:[-_.].*)?", re.IGNORECASE)
_TEXT = datasets.Value("string")


@dataclass(frozen=True)
class Part:
    """One source of training examples and, where files beside it are named so, of validation and test examples.

    name: the client's, as given or from the path; path: what the name was made of, and tells it from others.
    """

    path: tuple[str, ...]
    train: tuple[Any, ...]
    validation: tuple[Any, ...] = ()
    test: tuple[Any, ...] = ()
    name: str = ""


class Loaded(NamedTuple):
    """Examples of all sources. several: each source is a client, named in `client`; validation, test: None where they
    are to be taken of the training examples."""

    train: datasets.Dataset
    validation: datasets.Dataset | None
    test: datasets.Dataset | None
    several: bool


def parts_of(dataset: Any) -> list[Part]:
    """The sources that `dataset` stands for, each with its name, which counts where there are several.

    A list of sources; a mapping {client: source}, also as a YAML file or as JSON text; a quoted glob; a folder of data
    files, each a client, or of folders, each a client with all the files in it. A folder's files named train,
    validation (valid, val, dev) and test are splits of one client. Names are the shortest ends of the paths that tell
    them apart. Anything else is one source. Raises DataError for what names nothing, and for a name given twice.
    """
    mapping = _mapping(dataset)
    if mapping is not None:
        return [replace(_whole(source, str(name)), name=str(name)) for name, source in mapping.items()]
    given = list(dataset) if isinstance(dataset, list | tuple) else [dataset]
    parts = [part for source in given for part in _expanded(source)]
    names = telling_names([part.path for part in parts])
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"dataset {twice!r}: is named twice; name every source once, or use a mapping {{client: path}}")
    return [replace(part, name=name) for part, name in zip(parts, names, strict=True)]


def is_several(dataset: Any, parts: Sequence[Part]) -> bool:
    """Whether the sources are clients: more than one, or named by a mapping."""
    return len(parts) > 1 or _mapping(dataset) is not None


def load_several(
    dataset: Any,
    *,
    validation: Any = None,
    test: Any = None,
    validation_split: str | None = None,
    test_split: str | None = None,
    split: str | None = None,
    labels: Sequence[str] | None = None,
    head: Sequence[str] | None = None,
    client_column: str | None = None,
    **reading: Any,
) -> Loaded:
    """The examples of all sources of `dataset` (see `parts_of`), in one table.

    validation, test: sources of their own (again any of those); validation_split, test_split: splits of the same
    sources. Files that are named so beside a training file count too. Of several sources each row's `client` is the
    source's name, unless `client_column` says otherwise. Further arguments are those of `load_examples`.
    """
    parts = parts_of(dataset)
    several = is_several(dataset, parts)
    reading |= {"client_column": client_column}
    groups: dict[str, list[tuple[Any, datasets.Dataset]]] = {
        "train": _examples([(p.name, p.train) for p in parts], several, split=split, **reading)
    }
    for kind, source, named in (("validation", validation, validation_split), ("test", test, test_split)):
        if source is not None:
            held = parts_of(source)
            sources, many, wanted = [(p.name, p.train) for p in held], is_several(source, held), None
        elif named is not None:
            sources, many, wanted = [(p.name, p.train) for p in parts], several, named
        else:
            sources, many, wanted = [(p.name, getattr(p, kind)) for p in parts], several, None
        groups[kind] = _examples(sources, many, split=wanted, **reading)
    made = _numbered(groups, labels, head, reading) if reading.get("task") == "sequence_classification" else groups
    joined = {kind: _joined([examples for _, examples in found]) for kind, found in made.items()}
    return Loaded(joined["train"], joined["validation"], joined["test"], several)


def _examples(
    sources: Sequence[tuple[str, Sequence[Any]]], several: bool, *, client_column: str | None, **reading: Any
) -> list[tuple[Any, datasets.Dataset]]:
    """(table, examples) of every source, each row under its client's name where sources are clients."""
    found = []
    for name, files in sources:
        for source in files:
            table, examples = read_examples(source, client_column=client_column, **reading)
            if several and client_column is None:
                if "client" in examples.column_names:
                    examples = examples.remove_columns("client")
                examples = examples.add_column("client", [name] * len(examples), feature=_TEXT)
            found.append((table, examples))
    return found


def _numbered(
    groups: Mapping[str, list[tuple[Any, datasets.Dataset]]],
    labels: Sequence[str] | None,
    head: Sequence[str] | None,
    reading: Mapping[str, Any],
) -> dict[str, list[tuple[Any, datasets.Dataset]]]:
    """The groups with their labels numbered alike over all sources and splits."""
    tables = [table for found in groups.values() for table, _ in found]
    column = choose_column(reading.get("label_column"), LABEL_COLUMNS, tables[0].columns, "label_column")
    declared = tables[0].class_names.get(column)
    if any(table.class_names.get(column) != declared for table in tables):
        declared = None
    parts = [examples for found in groups.values() for _, examples in found]
    made = iter(numbered(parts, column, wanted=labels, declared=declared, head=head))
    return {kind: [(table, next(made)) for table, _ in found] for kind, found in groups.items()}


def _joined(parts: Sequence[datasets.Dataset]) -> datasets.Dataset | None:
    """The parts one after the other; a column that only some have (chat, client) is empty in the others."""
    if len(parts) < 2:
        return parts[0] if parts else None
    kinds = {name: kind for part in parts for name, kind in part.features.items()}
    whole = []
    for part in parts:
        for name in sorted(set(kinds) - set(part.column_names)):
            part = part.add_column(name, [""] * len(part), feature=kinds[name])
        whole.append(part.select_columns(list(kinds)))
    return datasets.concatenate_datasets(whole)


def _mapping(dataset: Any) -> Mapping[str, Any] | None:
    """{client: source} where that is what was given, as a mapping, a YAML file or JSON text."""
    if isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict):
        return None
    if isinstance(dataset, str | Path) and str(dataset).lower().endswith((".yaml", ".yml")):
        try:
            dataset = yaml.safe_load(Path(dataset).expanduser().read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise DataError(f"dataset {str(dataset)!r}: {one_line(error, 120)}; must be YAML of client: path") from None
        if not isinstance(dataset, dict):
            raise DataError("dataset: the YAML file must be a mapping of client: path; correct it")
    elif isinstance(dataset, str) and dataset.lstrip().startswith("{"):
        try:
            dataset = json.loads(dataset)
        except ValueError as error:
            raise DataError(f"dataset {dataset[:60]!r}: {error}; must be {{client: path}}") from None
    if not isinstance(dataset, Mapping):
        return None
    if not dataset:
        raise DataError("dataset: an empty mapping; it must name at least one client: path")
    return dataset


def _expanded(source: Any) -> list[Part]:
    """The parts that one given source stands for."""
    if not isinstance(source, str | Path):
        return [Part(("dataset",), (source,))]
    path = Path(source).expanduser()
    if not path.exists() and re.search(r"[*?\[]", str(source)):
        found = sorted(glob.glob(str(path), recursive=True))
        if not found:
            raise DataError(f"dataset {str(source)!r}: matches no file; check the pattern")
        return [part for name in found if Path(name).is_dir() or suffix_of(Path(name)) for part in _expanded(name)]
    if not path.is_dir() or is_saved_dataset(path) or task_files(path):
        return [Part(_path(path) if path.exists() else _name(str(source)), (str(source),))]
    files, folders = data_files(path), sorted(f for f in path.iterdir() if f.is_dir() and f.name[0] != ".")
    folders = [folder for folder in folders if _holds_data(folder)]
    if not files and not folders:
        return [Part(_path(path), (str(source),))]
    if splits := _splits(files):
        own = [_with_splits(path, splits)]
    else:
        own = [Part(_path(file), (str(file),)) for file in files]
    return own + [_whole(folder) for folder in folders]


def _whole(source: Any, name: str = "") -> Part:
    """One source as one part, whatever it holds: a folder's files together, or by the splits they are named after."""
    if not isinstance(source, str | Path) or not Path(source).expanduser().is_dir():
        return Part((name or "dataset",), (source,))
    path = Path(source).expanduser()
    if is_saved_dataset(path) or task_files(path):
        return Part(_path(path), (str(path),))
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name[0] != "." and suffix_of(file))
    return _with_splits(path, _splits(files) or {"train": tuple(map(str, files)) or (str(path),)})


def _with_splits(path: Path, splits: Mapping[str, tuple[str, ...]]) -> Part:
    return Part(_path(path), splits["train"], splits.get("validation", ()), splits.get("test", ()))


def _splits(files: Sequence[Path]) -> dict[str, tuple[str, ...]] | None:
    """{split: its files}, where every file is named after one and some are for training; None otherwise."""
    found: dict[str, list[str]] = {}
    for file in files:
        match = _SPLIT_FILE.fullmatch(stem_of(file))
        if match is None:
            return None
        found.setdefault(SPLITS[match[1].lower()], []).append(str(file))
    return {kind: tuple(names) for kind, names in found.items()} if "train" in found else None


def _holds_data(folder: Path) -> bool:
    return is_saved_dataset(folder) or any(suffix_of(file) for file in folder.rglob("*") if file.is_file())


def _path(path: Path) -> tuple[str, ...]:
    """The steps to a file or folder, its suffix left out."""
    path = path.resolve()
    return (*path.parts[1:-1], stem_of(path) if path.is_file() else path.name)


def _name(source: str) -> tuple[str, ...]:
    return tuple(source.split("/")) if source else ("dataset",)
