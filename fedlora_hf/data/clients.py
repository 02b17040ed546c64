"""From examples to clients, each with a train, a validation and a test split that share no record."""
# SPDX-License-Identifier: Apache-2.0

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from fedlora_hf.data import partition
from fedlora_hf.errors import ConfigError, DataError
from fedlora_hf.util.names import fit_ids
from fedlora_hf.util.say import say
from fedlora_hf.util.seeding import derive_seed

PARTITIONS = ("category", "task", "group", "dirichlet", "iid", "client")
SPLITS = ("train", "validation", "test")
_BATCH = 4096


def make_clients(
    examples: datasets.Dataset,
    *,
    partition_by: str,
    num_clients: int | None = None,
    dirichlet_alpha: float = 0.5,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    max_examples_per_client: int | None = None,
    seed: int = 0,
    validation: datasets.Dataset | None = None,
    test: datasets.Dataset | None = None,
) -> dict[str, datasets.DatasetDict]:
    """{client id: {"train", "validation", "test"}} of examples as `load_examples` gives them; a function of the seed.

    partition_by: "category", "task" and "group" are one thing, the group column; "client" is the client column;
        "iid" and "dirichlet" make `num_clients` clients, the latter skewed by class label, or by group without one.
    validation_fraction, test_fraction: of each client's examples, rounded, and at least one example unless 0.
    max_examples_per_client: a random choice of so many, before the split.
    validation, test: fixed examples in the place of a fraction. By a column, each client gets its own; examples that
        name no client, and those of iid and dirichlet clients, are everybody's. What they say is not trained on.

    Records that repeat word for word are removed first (`deduplicate`), so none is in two splits or two clients. A
    text that remains twice, under two groups for instance, is used for training only: no test text was seen before.

    Raises DataError for a column that is not there and a client too small to split; ConfigError for bad options.
    """
    _check_options(partition_by, num_clients, validation_fraction, test_fraction, max_examples_per_client)
    unique, removed = deduplicate(examples)
    if removed:
        say(f"{removed} of {len(examples)} records repeat another word for word, and are left out")
    fixed = {name: held for name, held in (("validation", validation), ("test", test)) if held is not None}
    unique = _without_held_out(unique, fixed)
    fractions = (0 if validation is not None else validation_fraction, 0 if test is not None else test_fraction)
    needed = 1 + sum(fraction > 0 for fraction in fractions)
    parts = _partition(unique, partition_by, num_clients, dirichlet_alpha, needed, seed)
    texts = _digests(unique, _spoken(unique))
    counts = Counter(texts)
    repeated = np.array([counts[text] > 1 for text in texts])
    clients = {}
    for client_id, indices in parts.items():
        rng = np.random.default_rng(derive_seed(seed, "split", client_id))
        chosen = rng.permutation(indices)[:max_examples_per_client]
        clients[client_id] = datasets.DatasetDict(
            {name: unique.select(rows) for name, rows in _split(chosen, repeated[chosen], fractions, client_id).items()}
        )
    for name, held in fixed.items():
        for client_id, own in _shared_out(held, unique, partition_by, name, list(clients)).items():
            clients[client_id][name] = own
    return clients


def client_names(examples: datasets.Dataset, partition_by: str) -> dict[str, str]:
    """{client id: the name it has in the data}, of the clients that `make_clients` makes by a column; {} otherwise."""
    column = _column(partition_by)
    if column is None or column not in examples.column_names:
        return {}
    return {client_id: name for name, client_id in fit_ids(set(examples[column][:])).items()}


def named_clients(data: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """({client id: its data}, {client id: its name}) of clients under any names; ids are fit, and told apart also where
    case does not count. Names are given of those whose id is another."""
    if not all(isinstance(name, str) and name for name in data):
        return dict(data), {}
    ids = fit_ids(data)
    return {ids[name]: data[name] for name in data}, told_names({ids[name]: name for name in data})


def told_names(names: Mapping[str, str]) -> dict[str, str]:
    """Those of {client id: name} that differ; each is said, since the client's folder is named by its id."""
    told = {client: name for client, name in names.items() if name != client}
    for client, name in told.items():
        say(f"client {name!r}: its folder, and its id, is {client}")
    return told


def with_data_facts(record: Mapping[str, Any], names: Mapping[str, str], wording: Mapping[str, Any]) -> dict[str, Any]:
    """Facts for the run record with, among those on the data, the clients' names and how examples were worded."""
    data = dict(record.get("data", {}))
    known = {**data.get("names", {}), **names}
    more = {"names": known, "wording": dict(wording)}
    return {**record, "data": {**data, **{name: value for name, value in more.items() if value}}}


def _column(partition_by: str) -> str | None:
    """The column whose values are the clients, None for a rule that makes them up."""
    return None if partition_by in ("iid", "dirichlet") else "client" if partition_by == "client" else "group"


def _without_held_out(examples: datasets.Dataset, fixed: Mapping[str, datasets.Dataset]) -> datasets.Dataset:
    """The examples that no fixed validation or test example repeats."""
    held = {digest for part in fixed.values() for digest in _digests(part, _spoken(part))}
    if not held:
        return examples
    kept = [place for place, digest in enumerate(_digests(examples, _spoken(examples))) if digest not in held]
    if len(kept) < len(examples):
        say(f"{len(examples) - len(kept)} training examples stand in the validation or test data too: not trained on")
    return examples.select(kept)


def _shared_out(
    held: datasets.Dataset, examples: datasets.Dataset, partition_by: str, kind: str, clients: Sequence[str]
) -> dict[str, datasets.Dataset]:
    """{client id: its examples of a fixed split}."""
    column = _column(partition_by)
    names = held[column][:] if column in held.column_names else []
    if column is None or not any(names):
        return dict.fromkeys(clients, held)
    ids = fit_ids(set(examples[column][:]))
    rows: dict[str, list[int]] = {client_id: [] for client_id in clients}
    strange = sorted({name for name in names if ids.get(name) not in rows})
    if strange:
        say(f"{kind} examples of {strange[0]!r} ({len(strange)} such names): no client of that name trains; not used")
    for place, name in enumerate(names):
        if ids.get(name) in rows:
            rows[ids[name]].append(place)
    if missing := [client_id for client_id, places in rows.items() if not places]:
        raise DataError(
            f"client {missing[0]!r}: has no {kind} example in the fixed {kind} data; give it some, or leave that data "
            f"out and set {kind}_fraction"
        )
    return {client_id: held.select(places) for client_id, places in rows.items()}


def deduplicate(examples: datasets.Dataset) -> tuple[datasets.Dataset, int]:
    """The examples without word for word repeats (all columns equal; the first is kept), and how many were removed."""
    first: dict[bytes, int] = {}
    for position, digest in enumerate(_digests(examples, examples.column_names)):
        first.setdefault(digest, position)
    removed = len(examples) - len(first)
    return (examples.select(list(first.values())) if removed else examples), removed


def _check_options(
    partition_by: str, num_clients: int | None, validation: float, test: float, max_examples: int | None
) -> None:
    if partition_by not in PARTITIONS:
        raise ConfigError(f"partition_by {partition_by!r}: must be one of {', '.join(PARTITIONS)}; choose one")
    if partition_by in ("iid", "dirichlet") and num_clients is None:
        raise ConfigError(f"partition_by {partition_by!r}: needs the number of clients; set num_clients")
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise ConfigError(
            f"validation_fraction {validation} and test_fraction {test}: must be 0 or more and less than 1 together; "
            "0.1 each is usual"
        )
    if max_examples is not None and max_examples < 1:
        raise ConfigError(f"max_examples_per_client {max_examples}: must be 1 or more; raise it, or leave it out")


def _partition(
    examples: datasets.Dataset, rule: str, num_clients: int | None, alpha: float, minimum: int, seed: int
) -> partition.Partition:
    if rule == "client":
        if "client" not in examples.column_names:
            raise DataError("partition_by 'client': the data names no clients; say which column does by client_column")
        return partition.by_column(examples["client"][:])
    if rule == "iid":
        return partition.iid(len(examples), num_clients or 0, seed, minimum)
    if rule == "dirichlet" and "label" in examples.column_names:
        return partition.dirichlet(examples["label"][:], num_clients or 0, alpha, seed, minimum)
    groups = examples["group"][:]
    if not any(groups):
        raise DataError(
            f"partition_by {rule!r}: the data has no category, task, task_name or group column; partition by iid, or "
            "rename the column that holds it"
        )
    if rule == "dirichlet":
        return partition.dirichlet(groups, num_clients or 0, alpha, seed, minimum)
    return partition.by_group(groups)


def _spoken(examples: datasets.Dataset) -> list[str]:
    """The columns of what an example says, without whose or of which group it is."""
    return ["text"] if "text" in examples.column_names else ["prompt", "completion"]


def _digests(examples: datasets.Dataset, columns: Sequence[str]) -> list[bytes]:
    """16 bytes for each example that are the same where all these columns are: a million texts need not be held."""
    found = []
    for start in range(0, len(examples), _BATCH):
        batch = examples[start : start + _BATCH]
        for values in zip(*(batch[name] for name in columns), strict=True):
            found.append(hashlib.blake2b(repr(values).encode(), digest_size=16).digest())
    return found


def _split(
    indices: NDArray[np.int64], repeated: NDArray[np.bool_], fractions: tuple[float, float], client_id: str
) -> dict[str, NDArray[np.int64]]:
    """Cut shuffled indices into train, validation and test; `repeated` ones stay in train. Each split is sorted."""
    validation, test = (max(1, round(fraction * len(indices))) if fraction > 0 else 0 for fraction in fractions)
    free = indices[~repeated]
    if len(indices) <= validation + test or len(free) < validation + test:
        raise DataError(
            f"client {client_id!r}: has {len(indices)} different examples, of which {len(free)} may be held out; "
            f"{validation} for validation, {test} for test and at least 1 for training are needed; give it more, merge "
            "it with another, or set the fractions to 0"
        )
    held_out = free[: validation + test]
    train = np.setdiff1d(indices, held_out)
    return {"train": train, "validation": np.sort(held_out[:validation]), "test": np.sort(held_out[validation:])}
