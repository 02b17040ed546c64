"""A partition gives every index to exactly one client, under a fit name, as a function of the seed."""
# SPDX-License-Identifier: Apache-2.0

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_hf.data import partition
from fedlora_hf.errors import DataError
from fedlora_hf.util.names import unfit_reason


def check(parts: partition.Partition, total: int) -> None:
    """Every index once, each client's sorted, ids fit and in order."""
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(total))
    assert all((np.diff(part) > 0).all() for part in parts.values())
    assert all(unfit_reason(name) is None for name in parts)
    assert list(parts) == sorted(parts)


def equal(first: partition.Partition, second: partition.Partition) -> bool:
    return list(first) == list(second) and all(np.array_equal(first[name], second[name]) for name in first)


@settings(deadline=None, database=None)
@given(values=st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=30))
def test_by_column_covers_all_and_keeps_values_together(values: list[str]) -> None:
    parts = partition.by_column(values)
    check(parts, len(values))
    assert len(parts) == len(set(values))
    assert len({name.lower() for name in parts}) == len(parts)
    assert all(len({values[index] for index in part}) == 1 for part in parts.values())


@settings(deadline=None, database=None)
@given(total=st.integers(1, 60), clients=st.integers(1, 12), seed=st.integers(0, 5))
def test_iid_covers_all_in_even_sizes(total: int, clients: int, seed: int) -> None:
    if total < clients:
        with pytest.raises(DataError, match=f"num_clients {clients}: must be 1 to {total}"):
            partition.iid(total, clients, seed)
        return
    parts = partition.iid(total, clients, seed)
    check(parts, total)
    sizes = list(map(len, parts.values()))
    assert max(sizes) - min(sizes) <= 1
    assert equal(parts, partition.iid(total, clients, seed))


@settings(deadline=None, database=None)
@given(seed=st.integers(0, 50), alpha=st.sampled_from([0.3, 1.0, 100.0]))
def test_dirichlet_covers_all_with_the_minimum(seed: int, alpha: float) -> None:
    labels = ["a", "b", "c"] * 40
    parts = partition.dirichlet(labels, 5, alpha, seed, minimum=3)
    check(parts, 120)
    assert min(map(len, parts.values())) >= 3
    assert equal(parts, partition.dirichlet(labels, 5, alpha, seed, minimum=3))


def test_dirichlet_alpha_sets_the_skew() -> None:
    labels = np.repeat(np.arange(5), 200)

    def largest_share(alpha: float) -> float:
        parts = partition.dirichlet(labels.tolist(), 10, alpha, seed=0)
        return float(np.mean([max(Counter(labels[part]).values()) / len(part) for part in parts.values()]))

    assert largest_share(0.1) > 0.6
    assert largest_share(1000.0) < 0.25


def test_ids_are_zero_padded() -> None:
    assert list(partition.iid(12, 3, 0)) == ["client-00", "client-01", "client-02"]
    assert list(partition.iid(101, 101, 0))[::100] == ["client-000", "client-100"]


def test_seeds_differ() -> None:
    assert not equal(partition.iid(50, 2, 0), partition.iid(50, 2, 1))
    assert not equal(partition.dirichlet([0, 1] * 25, 2, 1.0, 0), partition.dirichlet([0, 1] * 25, 2, 1.0, 1))


def test_unfit_and_colliding_names_become_fit_and_distinct() -> None:
    ids = partition.fit_ids(["open qa", "open/qa", "open-qa", "Open-QA", "con", "x" * 120, "x" * 119])
    assert len({name.lower() for name in ids.values()}) == 7
    assert all(unfit_reason(name) is None for name in ids.values())
    assert sorted(ids[text] for text in ("open qa", "open/qa", "open-qa")) == ["open-qa-2", "open-qa-3", "open-qa-4"]
    assert partition.fit_ids(reversed(list(ids))) == ids


def test_a_number_added_to_a_name_does_not_meet_another() -> None:
    ids = partition.fit_ids(["a b", "a/b", "a-b-2"])
    assert len(set(ids.values())) == 3


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda: partition.by_group(["a", ""]), "column 'group': record 2 has no value"),
        (lambda: partition.iid(5, 0, 0), "num_clients 0: must be 1 to 5"),
        (lambda: partition.dirichlet([0] * 5, 2, 0.5, 0, minimum=3), "num_clients 2: must be 1 to 1"),
        (lambda: partition.dirichlet([0] * 5, 2, 0.0, 0), "dirichlet_alpha 0.0: must be greater than 0"),
        (
            lambda: partition.dirichlet([0] * 40, 10, 0.001, 0, minimum=4),
            "100 draws left some client with fewer than 4",
        ),
    ],
)
def test_refusals_name_value_rule_and_remedy(call: object, part: str) -> None:
    with pytest.raises(DataError) as caught:
        call()
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
