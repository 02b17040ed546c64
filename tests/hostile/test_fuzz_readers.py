"""Whatever bytes the readers are given, they give a value or an error of ours: a fuzz run of a fixed budget."""
# SPDX-License-Identifier: Apache-2.0

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arena
import bad_adapters
import bad_records
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sample_record import sample_record

from fedlora_hf.adapter.files import WEIGHTS, plain_config, read_adapter
from fedlora_hf.aggregation.screening import examine
from fedlora_hf.data.formats import load_examples
from fedlora_hf.errors import FedLoraError
from fedlora_hf.flags import FlagParser, _from_yaml
from fedlora_hf.hub import parse_source, render_card
from fedlora_hf.record.record import RunRecord, check_complete
from fedlora_hf.update import ClientUpdate
from fedlora_hf.util.disk import parse_json
from fedlora_hf.util.names import fit_id, unfit_reason

# The same examples every time: a suite that sometimes fails tells nobody what they broke.
BUDGET = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(max_size=12), below, max_size=4),
    max_leaves=12,
)
PLACES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6)


def ours(action: Callable[[], Any]) -> Any:
    """The value of `action`; None where it raises an error of ours, in one printable line. No other may pass."""
    try:
        with arena.bounds():
            return action()
    except FedLoraError as error:
        said = str(error)
    assert said
    assert said.isprintable()
    return None


def overwritten(content: bytes, places: list[tuple[float, int]], cut: float) -> bytes:
    found = bytearray(content)
    for place, value in places:
        found[int(place * (len(found) - 1))] = value
    return bytes(found[: int(cut * len(found))])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return bad_adapters.write_sound(tmp_path / "adapter", 0)


@BUDGET
@given(places=PLACES, cut=st.sampled_from([1.0, 1.0, 1.0, 0.99, 0.5, 0.1]), header=st.booleans())
def test_bytes_of_an_adapter(folder: Path, places: list[tuple[float, int]], cut: float, header: bool) -> None:
    sound = (folder / WEIGHTS).read_bytes()
    share = 0.5 if header else 1.0
    (folder / WEIGHTS).write_bytes(overwritten(sound, [(place * share, value) for place, value in places], cut))
    found = ours(lambda: read_adapter(folder))
    if found is not None:
        assert isinstance(examine(ClientUpdate("mal", found[0])), str | dict)
    (folder / WEIGHTS).write_bytes(sound)


@BUDGET
@given(changes=st.dictionaries(st.sampled_from([*bad_adapters.config(), "rank_pattern", "alpha_pattern"]), ANY))
def test_values_of_a_config(folder: Path, changes: dict[str, Any]) -> None:
    config = {**bad_adapters.config(), **changes}
    (folder / bad_adapters.CONFIG).write_text(json.dumps(config))
    ours(lambda: read_adapter(folder))
    assert set(plain_config(config)) <= set(config)


@BUDGET
@given(
    pattern=st.dictionaries(st.text(alphabet="qv_proj.*+?()[]{}|^$\\0a", max_size=30), st.integers(0, 4), max_size=4)
)
def test_patterns_of_a_config(folder: Path, pattern: dict[str, int]) -> None:
    config = {**bad_adapters.config(), "rank_pattern": pattern}
    (folder / bad_adapters.CONFIG).write_text(json.dumps(config))
    ours(lambda: read_adapter(folder))


@BUDGET
@given(content=st.binary(max_size=200) | ANY.map(lambda value: json.dumps(value).encode()))
def test_any_text_as_a_record(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    assert ours(lambda: RunRecord.load(tmp_path)) is None


@BUDGET
@given(seed=st.integers(0, 10**9))
def test_a_record_with_anything_inside(seed: int) -> None:
    import random

    sound = json.loads(sample_record(num_clients=3, rounds=2, flagged=1).to_json())
    content = parse_json(json.dumps(bad_records.inside(sound, random.Random(seed))))
    record = ours(lambda: RunRecord.from_dict(content))
    if record is not None:
        assert render_card(record).encode()
        ours(lambda: check_complete(record, 2, "here"))


@BUDGET
@given(text=st.text(max_size=80) | st.from_regex(r"[a-z./@:-]{0,40}", fullmatch=True))
def test_any_text_as_a_source(text: str) -> None:
    source = ours(lambda: parse_source(text))
    if source is not None:
        assert unfit_reason(source.client_id) is None
        assert ".." not in source.subfolder.split("/")
    assert unfit_reason(fit_id(text)) is None


@BUDGET
@given(
    suffix=st.sampled_from([".json", ".jsonl", ".csv", ".parquet"]),
    content=st.binary(max_size=200)
    | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | ANY.map(lambda value: json.dumps(value).encode())
    | st.lists(
        st.dictionaries(st.sampled_from(["instruction", "response", "messages", "Instances"]), ANY), max_size=3
    ).map(lambda rows: json.dumps(rows).encode()),
)
def test_any_file_as_data(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content)
    ours(lambda: load_examples(path))


PARSER = FlagParser()


@BUDGET
@given(
    content=st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.binary(max_size=100)
    | ANY.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(st.sampled_from(["num_rounds", "dataset", "bf16", "target_modules"]), ANY).map(
        lambda value: json.dumps(value).encode()
    )
)
def test_any_file_as_config(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    flags = ours(lambda: _from_yaml(str(path), PARSER))
    assert flags is None or all(isinstance(flag, str) for flag in flags)
