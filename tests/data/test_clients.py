"""Clients share no record, no test text was trained on, and every split is a function of the seed and the client."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import datasets
import pytest
import sample_data

from fedlora_hf.data.clients import SPLITS, deduplicate, make_clients
from fedlora_hf.data.formats import load_examples
from fedlora_hf.errors import ConfigError, DataError
from fedlora_hf.util import say

Clients = dict[str, datasets.DatasetDict]


@pytest.fixture
def examples(dolly: Path) -> datasets.Dataset:
    return load_examples(dolly)


def sizes(clients: Clients) -> dict[str, list[int]]:
    return {name: [len(splits[split]) for split in SPLITS] for name, splits in clients.items()}


def pairs(dataset: datasets.Dataset) -> list[tuple[str, str]]:
    return list(zip(dataset["prompt"][:], dataset["completion"][:], strict=True))


def all_pairs(clients: Clients) -> list[tuple[str, str]]:
    return [pair for splits in clients.values() for split in SPLITS for pair in pairs(splits[split])]


def contents(clients: Clients) -> dict[str, dict[str, list]]:
    return {name: {split: splits[split].to_list() for split in SPLITS} for name, splits in clients.items()}


@pytest.mark.parametrize("rule", ["category", "task", "group", "iid", "dirichlet"])
def test_no_record_is_in_two_places_and_none_is_lost(examples: datasets.Dataset, rule: str) -> None:
    clients = make_clients(examples, partition_by=rule, num_clients=4, dirichlet_alpha=5.0)
    found = all_pairs(clients)
    assert len(found) == len(set(found)) == 80
    assert set(found) == set(pairs(examples))
    assert all(min(counts) >= 1 for counts in sizes(clients).values())


def test_by_category_every_client_is_one_category(examples: datasets.Dataset) -> None:
    clients = make_clients(examples, partition_by="category", validation_fraction=0.1, test_fraction=0.3)
    assert sizes(clients) == {name: [6, 1, 3] for name in sorted(sample_data.CATEGORIES)}
    assert all(set(splits[split]["group"][:]) == {name} for name, splits in clients.items() for split in SPLITS)


def test_repeats_are_counted_and_said(
    examples: datasets.Dataset, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(say, "_SAID", set())
    unique, removed = deduplicate(examples)
    assert (len(unique), removed) == (80, 3)
    assert unique.to_list() == examples.to_list()[:80]
    make_clients(examples, partition_by="category")
    assert "3 of 83 records repeat another word for word, and are left out" in caplog.text


def test_a_text_under_two_groups_is_only_trained_on() -> None:
    records = sample_data.dolly_records(40)
    for record in records:
        record["category"] = "first"
    twins = [{**record, "category": "second"} for record in records[:5]]
    others = [{**record, "category": "second"} for record in sample_data.dolly_records(80, seed=9)[40:]]
    examples = load_examples(datasets.Dataset.from_list(records + twins + others))
    clients = make_clients(examples, partition_by="category", validation_fraction=0.3, test_fraction=0.5)
    trained = {pair for splits in clients.values() for pair in pairs(splits["train"])}
    held_out = [
        pair for splits in clients.values() for split in ("validation", "test") for pair in pairs(splits[split])
    ]
    assert len(all_pairs(clients)) == len(examples)
    assert not trained & set(held_out)
    assert len(held_out) == len(set(held_out))


def test_the_splits_are_a_function_of_seed_and_client(examples: datasets.Dataset) -> None:
    first = contents(make_clients(examples, partition_by="category", seed=3))
    assert contents(make_clients(examples, partition_by="category", seed=3)) == first
    assert contents(make_clients(examples, partition_by="category", seed=4)) != first
    # A client's split does not depend on which other clients there are.
    alone = examples.select([i for i, group in enumerate(examples["group"]) if group == "open_qa"])
    assert contents(make_clients(alone, partition_by="category", seed=3))["open_qa"] == first["open_qa"]


def test_an_explicit_client_column(examples: datasets.Dataset) -> None:
    named = examples.add_column("client", ["Ward 1" if i % 2 else "Ward 2" for i in range(len(examples))])
    clients = make_clients(named, partition_by="client")
    assert list(clients) == ["Ward-1", "Ward-2"]
    assert set(clients["Ward-1"]["train"]["client"]) == {"Ward 1"}


def test_fractions_of_zero_hold_nothing_out(examples: datasets.Dataset) -> None:
    clients = make_clients(examples, partition_by="category", validation_fraction=0, test_fraction=0)
    assert all(counts == [10, 0, 0] for counts in sizes(clients).values())


def test_max_examples_per_client(examples: datasets.Dataset) -> None:
    clients = make_clients(examples, partition_by="category", max_examples_per_client=5)
    assert all(counts == [3, 1, 1] for counts in sizes(clients).values())


def test_dirichlet_skews_class_labels(dolly: Path) -> None:
    labelled = load_examples(dolly, task="sequence_classification").remove_columns("group")
    clients = make_clients(labelled, partition_by="dirichlet", num_clients=3, dirichlet_alpha=0.5, seed=1)
    assert sum(map(sum, sizes(clients).values())) == len(deduplicate(labelled)[0])
    assert clients["client-00"]["train"].features["label"].num_classes == 8


def test_a_client_too_small_to_split_is_named() -> None:
    records = sample_data.dolly_records(16)
    records.append({**records[0], "instruction": "Alone.", "category": "rare"})
    with pytest.raises(DataError) as caught:
        make_clients(load_examples(datasets.Dataset.from_list(records)), partition_by="category")
    message = str(caught.value)
    assert "client 'brainstorming': has 2 different examples" in message
    assert "at least 1 for training" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("options", "error", "part"),
    [
        ({"partition_by": "hospital"}, ConfigError, "partition_by 'hospital': must be one of category"),
        ({"partition_by": "iid"}, ConfigError, "set num_clients"),
        ({"partition_by": "client"}, DataError, "client_column"),
        ({"partition_by": "iid", "num_clients": 40}, DataError, "num_clients 40: must be 1 to 26"),
        ({"partition_by": "category", "test_fraction": 0.9, "validation_fraction": 0.1}, ConfigError, "less than 1"),
        ({"partition_by": "category", "test_fraction": -0.1}, ConfigError, "must be 0 or more"),
        ({"partition_by": "category", "max_examples_per_client": 0}, ConfigError, "must be 1 or more"),
    ],
)
def test_bad_options(examples: datasets.Dataset, options: dict, error: type[Exception], part: str) -> None:
    with pytest.raises(error) as caught:
        make_clients(examples, **options)
    assert part in str(caught.value)


@pytest.mark.parametrize("rule", ["category", "dirichlet"])
def test_data_without_groups(rule: str) -> None:
    plain = load_examples(datasets.Dataset.from_list([{"prompt": str(i), "completion": "x"} for i in range(9)]))
    with pytest.raises(DataError, match=f"partition_by '{rule}': the data has no category"):
        make_clients(plain, partition_by=rule, num_clients=2)


@pytest.mark.real_data
def test_published_dolly_by_category(real_data: Path) -> None:
    examples = load_examples(real_data / "dolly" / "databricks-dolly-15k.jsonl")
    assert deduplicate(examples)[1] == 8
    clients = make_clients(examples, partition_by="category")
    assert len(clients) == 8
    assert sum(map(sum, sizes(clients).values())) == 15_003
    trained = {pair for splits in clients.values() for pair in pairs(splits["train"])}
    tested = {pair for splits in clients.values() for split in ("validation", "test") for pair in pairs(splits[split])}
    assert not trained & tested


@pytest.mark.real_data
def test_published_natural_instructions_by_task(real_data: Path) -> None:
    clients = make_clients(load_examples(real_data / "natural_instructions"), partition_by="task")
    assert len(clients) == 40
    assert "task190_snli_classification" in clients
    assert all(counts == [240, 30, 30] for counts in sizes(clients).values())
