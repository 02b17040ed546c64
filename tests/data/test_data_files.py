"""Every kind of data file that people have: compressed, with tabs, in UTF-16, with long fields, as columns."""
# SPDX-License-Identifier: Apache-2.0

import contextlib
import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_hf.data.files import read_file
from fedlora_hf.data.sources import read_table
from fedlora_hf.errors import DataError

ROWS = [{"prompt": "a", "completion": "b, c"}, {"prompt": "é 東", "completion": "f"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABS = "prompt\tcompletion\na\tb, c\né 東\tf\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.ndjson", LINES.encode()),
        ("d.jsonl.gz", gzip.compress(LINES.encode())),
        ("d.json.gz", gzip.compress(json.dumps(ROWS).encode())),
        ("d.tsv", TABS.encode()),
        ("d.tsv.gz", gzip.compress(TABS.encode())),
        ("D.JSONL", LINES.encode()),
        ("d.jsonl", LINES.encode("utf-16")),
        ("d.jsonl", b"\xfe\xff" + LINES.encode("utf-16-be")),
        ("d.csv", TABS.replace(", ", " ").replace("\t", ",").replace("b c", '"b, c"').encode("utf-8-sig")),
        ("d.json", json.dumps({"prompt": ["a", "é 東"], "completion": ["b, c", "f"]}).encode()),
        ("d.json", json.dumps({"prompt": {"0": "a", "1": "é 東"}, "completion": {"0": "b, c", "1": "f"}}).encode()),
    ],
    ids=["ndjson", "gz", "json gz", "tabs", "tabs gz", "capitals", "utf-16", "big end", "BOM", "lists", "pandas"],
)
def test_the_same_records_of_every_kind(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert list(read_table(tmp_path / name).records) == ROWS


def test_fields_of_any_length_and_the_limit_is_left_as_it_was(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    (tmp_path / "d.csv").write_text("prompt,completion\n" + "word " * 40_000 + ",x\n")
    assert len(str(next(iter(read_table(tmp_path / "d.csv").records))["prompt"])) == 200_000
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("content", "count"),
    [
        ({"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}, 1),
        ({"prompt": "a", "completion": "b"}, 1),
        ({"prompt": ["a", "b"], "completion": ["c"]}, 1),
        ({"prompt": ["a", "b"], "completion": ["c", "d"]}, 2),
    ],
    ids=["turns", "one record", "unequal lists", "columns"],
)
def test_an_object_is_a_record_or_a_table_of_columns(tmp_path: Path, content: Any, count: int) -> None:
    (tmp_path / "d.json").write_text(json.dumps(content))
    assert len(list(read_file(tmp_path / "d.json"))) == count


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("d.jsonl.gz", b"no gzip", "cannot be read"),
        ("d.jsonl.gz", gzip.compress(LINES.encode())[:-9], "cannot be read"),
        ("d.jsonl", b"[" * 100_000, "line 1"),
        ("d.json", b"[" * 100_000, "must be"),
        ("d.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "line 1"),
        ("d.jsonl", b'{"a": 1}\n' * 3000 + b'{"a": "\xff"}', "byte 27007 is not UTF-8"),
    ],
    ids=["no gzip", "cut", "deep line", "deep", "long number", "late byte"],
)
def test_what_is_broken_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes, part: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_table(tmp_path / name).records)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(deadline=None, database=None, max_examples=150)
@given(content=st.binary(max_size=60), name=st.sampled_from(["d.jsonl", "d.csv", "d.tsv", "d.json", "d.jsonl.gz"]))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str) -> None:
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(content)
    with contextlib.suppress(DataError):
        list(read_table(path).records)


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_a_name_that_stands_twice_in_one_object_is_refused(name: str, tmp_path: Path) -> None:
    """json takes the second without a word."""
    (tmp_path / name).write_text('{"prompt": "a", "prompt": "b", "completion": "c"}\n')
    with pytest.raises(DataError, match="'prompt' stands twice in one object"):
        list(read_file(tmp_path / name))
