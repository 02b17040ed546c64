"""Several sources are several clients, under names that tell them apart; fixed splits come with them."""
# SPDX-License-Identifier: Apache-2.0

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from fedlora_hf.data.clients import client_names, make_clients, named_clients
from fedlora_hf.data.several import load_several, parts_of
from fedlora_hf.errors import DataError
from fedlora_hf.util.names import fit_ids, telling_names, unfit_reason


def write(path: Path, *words: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": f"{word}?", "completion": word}) + "\n" for word in words))
    return path


def names(dataset: Any) -> list[str]:
    return [part.name for part in parts_of(dataset)]


def clients(dataset: Any, **options: Any) -> dict[str, list[str]]:
    loaded = load_several(dataset, task="causal_lm", **options)
    assert loaded.several
    found: dict[str, list[str]] = {}
    for row in loaded.train:
        found.setdefault(row["client"], []).append(row["completion"])
    return found


def test_files_a_glob_and_a_folder_are_the_same_clients(tmp_path: Path) -> None:
    files = [write(tmp_path / "clients" / f"{name}.jsonl", name, name + name) for name in ("ada", "bob")]
    want = {"ada": ["ada", "adaada"], "bob": ["bob", "bobbob"]}
    assert clients([str(file) for file in files]) == want
    assert clients(str(tmp_path / "clients" / "*.jsonl")) == want
    assert clients(str(tmp_path / "clients")) == want
    assert clients({"ada": str(files[0]), "bob": files[1]}) == want
    listing = tmp_path / "clients.yaml"
    listing.write_text(f"ada: {files[0]}\nbob: {files[1]}\n")
    assert clients(str(listing)) == want


def test_folders_of_folders_are_clients_with_all_their_files(tmp_path: Path) -> None:
    write(tmp_path / "all" / "north" / "a.jsonl", "n1")
    write(tmp_path / "all" / "north" / "deep" / "b.jsonl", "n2")
    write(tmp_path / "all" / "south" / "train.jsonl", "s1")
    write(tmp_path / "all" / "south" / "test.jsonl", "s2")
    write(tmp_path / "all" / "south" / "dev.jsonl", "s3")
    loaded = load_several(str(tmp_path / "all"), task="causal_lm")
    assert dict(zip(loaded.train["completion"], loaded.train["client"], strict=True)) == {
        "n1": "north",
        "n2": "north",
        "s1": "south",
    }
    assert loaded.test is not None
    assert loaded.validation is not None
    assert loaded.test["completion"][:] == ["s2"]
    assert loaded.validation["client"][:] == ["south"]


def test_one_source_is_no_client(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", "x")
    loaded = load_several(str(file), task="causal_lm")
    assert not loaded.several
    assert "client" not in loaded.train.column_names
    assert loaded.validation is loaded.test is None


@pytest.mark.parametrize(
    ("paths", "want"),
    [
        (["a/x", "b/x"], ["a", "b"]),
        (["p/a/checkpoint-100", "p/b/checkpoint-100"], ["a", "b"]),
        (["p/a", "p/b"], ["a", "b"]),
        (["a/x", "b/x", "c/y"], ["a/x", "b/x", "y"]),
        (["x", "a/x"], ["x", "a/x"]),
        (["a/b/c"], ["c"]),
        (["a", "a"], ["a", "a"]),
    ],
)
def test_names_are_the_shortest_ends_that_tell_paths_apart(paths: list[str], want: list[str]) -> None:
    assert telling_names([path.split("/") for path in paths]) == want


def test_hub_ids_and_datasets_are_sources() -> None:
    assert names(["user/data:small", "user/data:large"]) == ["data:small", "data:large"]
    data = datasets.Dataset.from_dict({"question": ["a"], "answer": ["b"]})
    assert clients({"x": data, "y": datasets.DatasetDict({"train": data})}) == {"x": ["b"], "y": ["b"]}


def test_sources_of_different_schemas_have_the_same_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "1", "category": "g"}\n')
    said = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "2"}]
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": said, "client": "own"}) + "\n")
    loaded = load_several(str(tmp_path), task="causal_lm")
    assert loaded.train["completion"][:] == ["1", "2"]
    assert loaded.train["client"][:] == ["a", "b"]
    assert loaded.train["chat"][0] == ""


def test_labels_are_numbered_alike_over_sources_and_splits(tmp_path: Path) -> None:
    for name, label in (("a", "yes"), ("b", "no")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name, "label": label}) + "\n")
    loaded = load_several(str(tmp_path), task="sequence_classification", test=str(tmp_path / "b.jsonl"))
    assert loaded.train.features["label"].names == ["no", "yes"]
    assert loaded.train["label"][:] == [1, 0]
    assert loaded.test is not None
    assert loaded.test["label"][:] == [0]


def test_splits_of_a_saved_dataset(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"prompt": ["a", "b"], "completion": ["1", "2"]})
    datasets.DatasetDict({"train": data, "held": data.select([1])}).save_to_disk(tmp_path / "saved")
    loaded = load_several(str(tmp_path / "saved"), task="causal_lm", test_split="held")
    assert len(loaded.train) == 2
    assert loaded.test is not None
    assert loaded.test["completion"][:] == ["2"]
    # Read from the disk, it stays there.
    assert loaded.train.cache_files == []


@pytest.mark.parametrize(
    ("dataset", "part"),
    [
        ("/nowhere/*.jsonl", "matches no file; check the pattern"),
        (["a.jsonl", "a.jsonl"], "is named twice"),
        ({}, "an empty mapping"),
        ("nowhere.yaml", "must be YAML of client: path"),
    ],
)
def test_what_names_nothing_is_refused(dataset: Any, part: str) -> None:
    with pytest.raises(DataError) as caught:
        parts_of(dataset)
    assert part in str(caught.value)


def held(words: list[str], **columns: list[str]) -> datasets.Dataset:
    made = {"prompt": [f"{w}?" for w in words], "completion": words, "references": [[w] for w in words]}
    return datasets.Dataset.from_dict({**made, "group": [""] * len(words), **columns})


def test_fixed_splits_go_to_their_clients_and_are_not_trained_on() -> None:
    train = held(list("abcdef"), client=["x"] * 3 + ["y"] * 3)
    test = held(list("fgh"), client=["y", "y", "x"])
    made = make_clients(train, partition_by="client", test=test, validation_fraction=0)
    assert {name: splits["test"]["completion"][:] for name, splits in made.items()} == {"x": ["h"], "y": ["f", "g"]}
    assert {name: splits["train"]["completion"][:] for name, splits in made.items()} == {
        "x": ["a", "b", "c"],
        "y": ["d", "e"],
    }
    with pytest.raises(DataError, match="client 'x': has no test example in the fixed test data"):
        make_clients(train, partition_by="client", test=test.select([0]), validation_fraction=0)


def test_fixed_examples_that_name_nobody_are_everybodys() -> None:
    train, test = held(list("abcdef")), held(list("gh"))
    made = make_clients(train, partition_by="iid", num_clients=2, test=test, validation=test)
    assert all(splits["test"]["completion"][:] == ["g", "h"] for splits in made.values())
    assert sum(len(splits["train"]) for splits in made.values()) == 6


def test_names_stay_names() -> None:
    given = ["東京", "Hôpital d'Été", "京都", "a", "A"]
    ids = fit_ids(given)
    assert ids["Hôpital d'Été"] == "Hopital-d-Ete"
    assert ids["東京"].startswith("client-")
    assert len({name.lower() for name in ids.values()}) == len(given)
    assert all(unfit_reason(name) is None for name in ids.values())
    assert fit_ids(["東京"])["東京"] == ids["東京"]
    data, told = named_clients({name: name for name in given})
    assert sorted(data.values()) == sorted(given)
    assert told == {client: name for client, name in data.items() if client != name}
    assert "a" in data.values()
    rows = held(["x", "y"], client=["東京", "b"])
    assert client_names(rows, "client") == {ids["東京"]: "東京", "b": "b"}
