"""The schedule gives every client to one process, and no process much more than its share."""
# SPDX-License-Identifier: Apache-2.0

from hypothesis import given
from hypothesis import strategies as st

from fedlora_hf.launch.schedule import shares


@given(costs=st.lists(st.integers(1, 50), min_size=1, max_size=20), processes=st.integers(1, 6))
def test_every_client_once_and_within_the_bound(costs: list[int], processes: int) -> None:
    named = {f"client{number:02d}": cost for number, cost in enumerate(costs)}
    plan = shares(named, processes)
    assert len(plan) == processes
    assert sorted(client for part in plan for client in part) == sorted(named)
    assert plan == shares(dict(reversed(named.items())), processes)
    makespan = max(sum(named[client] for client in part) for part in plan)
    # Graham's bound of any greedy schedule, which holds for all costs and needs no optimum to compare with.
    assert makespan <= sum(costs) / processes + max(costs) * (1 - 1 / processes) + 1e-9


def test_costly_clients_go_first_and_ties_by_name() -> None:
    assert shares({"a": 1, "b": 5, "c": 1, "d": 1}, 2) == [["b"], ["a", "c", "d"]]
    assert shares({"b": 2, "a": 2, "c": 2}, 1) == [["a", "b", "c"]]
    assert shares({"a": 1}, 3) == [["a"], [], []]
    assert shares({}, 2) == [[], []]
