"""Every kind of source is read; what cannot be read is refused in one line that says where and what to do."""
# SPDX-License-Identifier: Apache-2.0

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from fedlora_hf.data.sources import read_table
from fedlora_hf.errors import DataError

RECORDS = [{"prompt": "a", "completion": "b, c"}, {"prompt": "d\u2028e", "completion": "f"}]


def records(source: Path | str, **options: Any) -> list[Any]:
    """Gone through twice: what is read can be read again."""
    found = read_table(source, **options).records
    assert list(found) == list(found)
    return list(found)


def refused(source: Path | str) -> str:
    with pytest.raises(DataError) as caught:
        records(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_file_format_gives_the_same_records(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data.{suffix}"
    if suffix == "jsonl":
        # Unescaped U+2028 inside a string is valid JSON and no line break; blank lines are skipped.
        write(path, "\n\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS))
    elif suffix == "json":
        write(path, json.dumps(RECORDS))
    elif suffix == "csv":
        write(path, 'prompt,completion\na,"b, c"\nd\u2028e,f\n')
    else:
        datasets.Dataset.from_list(RECORDS).to_parquet(path)
    assert records(path) == RECORDS


def test_csv_fields_may_hold_line_breaks(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", 'prompt,completion\n"a\n\nb",c\n')
    assert records(path) == [{"prompt": "a\n\nb", "completion": "c"}]


def test_json_lines_under_the_name_json(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", "\n".join(json.dumps(record) for record in RECORDS))
    assert records(path) == RECORDS


def test_folder_of_tasks_its_parent_and_a_single_task(tasks: Path) -> None:
    found = records(tasks)
    assert len(found) == 40
    assert records(tasks.parent) == found
    assert records(tasks / "task001_last_word.json") == found[:10]
    assert set(found[0]) == {"task_name", "definition", "inputs", "targets"}
    assert found[0]["task_name"] == "task001_last_word"


def test_saved_dataset_keeps_class_names_and_the_split(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    dataset = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(tmp_path / "saved")
    assert datasets.load_from_disk(tmp_path / "saved")["train"].num_rows == 2
    table = read_table(tmp_path / "saved")
    assert table.class_names == {"label": ["no", "yes"]}
    assert len(list(table.records)) == 2
    assert len(records(tmp_path / "saved", split="test")) == 1
    with pytest.raises(DataError, match=r"no split 'dev'; name one of train, test"):
        read_table(tmp_path / "saved", split="dev")


@pytest.mark.parametrize("name", ["absent.jsonl", "./absent", "a/b/absent", "folder/absent.json"])
def test_missing_file_is_not_taken_for_a_hub_id(name: str) -> None:
    assert "no such file or folder; check the path" in refused(name)


def test_unknown_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str, name: str | None, **options: object) -> None:
        assert (path, name, options) == ("user/data", "small", {"split": None, "revision": None})
        raise datasets.exceptions.DatasetNotFoundError("nothing\nthere")

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert "nothing there" in refused("user/data:small")


def test_hub_dataset_is_read_with_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str, name: str | None, *, split: str, revision: str) -> datasets.Dataset:
        assert (path, name, split, revision) == ("user/data", None, "train[:2]", "v1")
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert records("user/data", split="train[:2]", revision="v1") == RECORDS


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("d.jsonl", '{"a": 1}\n\n{"a": \n', "d.jsonl, line 3"),
        ("d.jsonl", '{"a": 1}\n[2]\n', "line 2: '[2]' is not a JSON object"),
        ("d.json", '[{"a": 1},\n {"a" 2}]', "d.json, line 2"),
        ("d.json", '[{"a": 1}, 5]', "record 2: '5' is not a JSON object"),
        ("d.json", '{"a": 1}\n{"a": 2}\n{', "d.json, line 3"),
        ("d.csv", "a,b\n1,2\n1\n", "line 3: every row must have the 2 fields"),
        ("d.csv", "a,b\n1,2,3\n", "line 2: every row must have the 2 fields"),
        ("d.csv", 'a,b\n1,"2"3\n', "line 2"),
        ("d.jsonl", "", "holds no records"),
        ("d.csv", "a,b\n", "holds no records"),
        ("d.parquet", "no parquet", "must be a Parquet file"),
        ("d.txt", "hello", "must end with .jsonl, .ndjson, .json, .csv, .tsv, .parquet (or .gz)"),
        ("t.json", '{"Instances": [{"input": "a", "output": ["b"]}]}', "t.json: a task file has Definition"),
        ("t.json", '{"Definition": ["x"], "Instances": [{"input": "a"}]}', "instance 1: a task file has Definition"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(tmp_path: Path, name: str, text: str, part: str) -> None:
    assert part in refused(write(tmp_path / name, text))


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b'{"a": "\xff"}')
    assert "byte 7 is not UTF-8" in refused(tmp_path / "d.jsonl")


def test_folder_without_data(tmp_path: Path) -> None:
    write(tmp_path / "other.txt", "a")
    assert "must hold Natural Instructions task files" in refused(tmp_path)


@pytest.mark.parametrize("place", ["data.jsonl", "data.parquet", "folder/task1.json", "folder/tasks/task2.json"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)], ids=["pipe", "device"])
def test_pipes_and_devices_are_refused_and_not_waited_for(tmp_path: Path, place: str, make: object) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    make(path)  # type: ignore[operator]
    message = refused(tmp_path / place.split("/")[0])
    assert f"{path}: is no plain file" in message
