"""What holds for every method: order, one client, equal clients, one bad client, dtype, weights, records."""
# SPDX-License-Identifier: Apache-2.0

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from sample_updates import cohort, dense, relative, same_bits, shares, with_common_factor

from fedlora_hf.aggregation import aggregate as combine
from fedlora_hf.aggregation.cohort import client_weights
from fedlora_hf.errors import ConfigError, UpdateError
from fedlora_hf.methods import METHODS, method_named
from fedlora_hf.update import AdapterState, Aggregate, ClientUpdate, LoraFactors

EVERY = sorted(METHODS)
ALONE = [name for name in EVERY if name != "clair"]  # clair compares clients with each other: it needs three


def clients_for(method: str, count: int = 8, **settings: object) -> list[ClientUpdate]:
    clients = cohort(count, **settings)  # type: ignore[arg-type]
    return with_common_factor(clients) if METHODS[method].trained(1) == ("B",) else clients


def aggregate(updates: Iterable[ClientUpdate], method: str, **options: Any) -> Aggregate:
    """As the package's; a method that needs a server's update gets client0's."""
    if method in METHODS and METHODS[method].needs_server:
        options.setdefault("server", cohort(1)[0].state)
    return combine(updates, method, **options)


def poisoned(client: ClientUpdate, value: float = float("nan")) -> ClientUpdate:
    state = dict(client.state)
    last = max(state)
    B = state[last].B.clone()
    B[-1, -1] = value
    return replace(client, state=AdapterState({**state, last: LoraFactors(state[last].A, B, 2.0)}, client.state.extras))


def finite(result: Aggregate) -> bool:
    states = [result.state, *result.personalised.values()]
    return all(bool(torch.isfinite(dense(state)).all()) for state in states)


@pytest.mark.parametrize("method", EVERY)
def test_the_order_of_the_cohort_changes_no_bit(method: str) -> None:
    clients = clients_for(method)
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    one, two = aggregate(clients, method), aggregate((clients[k] for k in order), method)
    assert same_bits(one.state, two.state)
    assert list(one.weights.items()) == list(two.weights.items())
    assert list(one.personalised) == list(two.personalised)
    assert all(same_bits(one.personalised[k], two.personalised[k]) for k in one.personalised)
    assert one.modules == two.modules


@pytest.mark.parametrize("method", ALONE)
def test_one_client_gives_itself(method: str) -> None:
    clients = clients_for(method, 1)
    result = aggregate(clients, method)
    assert relative(dense(result.state), dense(clients[0].state)) < 1e-6
    assert torch.allclose(result.state.extras["score.weight"], clients[0].state.extras["score.weight"])
    assert dict(result.weights) == {"client0": pytest.approx(1)}


@pytest.mark.parametrize("method", EVERY)
def test_equal_clients_give_the_one_they_all_are(method: str) -> None:
    one = cohort(1)[0]
    result = aggregate([ClientUpdate(f"c{k}", one.state, k + 1) for k in range(6)], method)
    assert relative(dense(result.state), dense(one.state)) < 1e-6
    assert sum(result.weights.values()) == pytest.approx(1)
    assert result.flagged == ()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("method", EVERY)
def test_one_bad_client_of_eight_never_touches_the_result(method: str, bad: float) -> None:
    clients = clients_for(method)
    result = aggregate([*clients[:3], poisoned(clients[3], bad), *clients[4:]], method)
    assert list(result.quarantined) == ["client3"]
    assert "client3" not in result.weights
    assert "client3" not in result.personalised
    assert finite(result)
    assert same_bits(result.state, aggregate([*clients[:3], *clients[4:]], method).state)


@pytest.mark.parametrize("method", EVERY)
def test_bfloat16_updates_are_averaged_in_full_precision(method: str) -> None:
    halves, lifted = [], []
    for client in clients_for(method):
        half = {module: f.to(torch.bfloat16) for module, f in client.state.items()}
        halves.append(replace(client, state=AdapterState(half)))
        lifted.append(replace(client, state=AdapterState({module: f.to(torch.float32) for module, f in half.items()})))
    one, two = aggregate(halves, method), aggregate(lifted, method)
    assert all(f.A.dtype == f.B.dtype == torch.float32 for f in one.state.values())
    assert relative(dense(one.state), dense(two.state)) < 1e-6


@pytest.mark.parametrize("method", [name for name in EVERY if METHODS[name].trained(1) == ("A", "B")])
def test_ranks_and_scales_may_differ(method: str) -> None:
    clients = cohort(8, ranks=(2, 4, 3), scales=(2.0, 0.5))
    result = aggregate(clients, method)
    assert finite(result)
    if method not in ("stacking", "fedex"):
        assert {f.rank for f in result.state.values()} == {4}


@pytest.mark.parametrize("method", EVERY)
def test_the_record_of_a_result_is_plain(method: str) -> None:
    result = aggregate(clients_for(method), method)
    text = json.dumps([result.modules, result.diagnosis, dict(result.weights), result.n_iter, result.converged])
    assert "NaN" not in text
    assert not any(tensor.requires_grad for f in result.state.values() for tensor in (f.A, f.B))
    for module, info in result.modules.items():
        assert info["rank"] == result.state[module].rank
        assert 0 <= info["discarded_energy"] <= 1
        assert info["spectrum"] == sorted(info["spectrum"], reverse=True)


@pytest.mark.parametrize("method", EVERY)
def test_updates_with_an_autograd_graph_are_aggregated_without_it(method: str) -> None:
    clients = clients_for(method)
    state = clients[0].state
    live = {m: LoraFactors(f.A.clone().requires_grad_(), f.B.clone().requires_grad_()) for m, f in state.items()}
    clients[0] = replace(clients[0], state=AdapterState(live, {"score.weight": torch.ones(3, 6, requires_grad=True)}))
    result = aggregate(clients, method)
    for state in (result.state, *result.personalised.values()):
        assert not any(tensor.requires_grad for f in state.values() for tensor in (f.A, f.B))
    assert not result.state.extras["score.weight"].requires_grad


def test_every_method_says_what_it_is() -> None:
    for name, method in METHODS.items():
        assert method.name == name == method_named(name).name
        assert method.title
        assert "arXiv" in method.paper or name == "local"  # every rule has a source; the baseline is none
        assert method.averages in ("factors", "product")
    assert METHODS["ffa"].trains == ("B",)
    assert METHODS["fedsa"].keeps == ("B",)
    assert METHODS["stacking"].restarts
    assert [METHODS["rolora"].trained(number) for number in (1, 2, 3)] == [("B",), ("A",), ("B",)]
    assert METHODS["fltrust"].needs_server


def test_weights_by_examples_or_uniform() -> None:
    clients = cohort(4)
    assert list(client_weights(clients, "examples").values()) == pytest.approx(shares(clients).tolist())
    assert set(client_weights(clients, "uniform").values()) == {0.25}
    unknown = [*clients[:3], replace(clients[3], num_examples=None)]
    assert set(client_weights(unknown, "examples").values()) == {0.25}


def test_the_reference_sets_the_scale_that_the_result_is_written_with() -> None:
    clients, reference = cohort(3, scales=(2.0, 0.5)), cohort(1, scales=(4.0,), seed=5)[0].state
    with_it, without = (aggregate(clients, "product_mean", reference=r) for r in (reference, None))
    assert {f.scale for f in with_it.state.values()} == {4.0}
    assert {f.scale for f in without.state.values()} == {1.0}
    assert relative(dense(with_it.state), dense(without.state)) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"method": "fedvg"}, "aggregation method 'fedvg': must be one of"),
        ({"weight_by": "size"}, "weight_by='size'"),
        ({"partial_modules": "some"}, "partial_modules='some'"),
        ({"target_rank": 0}, "target_rank=0"),
        ({"target_rank": 2.5}, "target_rank=2.5"),
        ({"target_rank": True}, "target_rank=True"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        combine(cohort(2), **{"method": "fedavg", **arguments})  # type: ignore[arg-type]
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [None, "abc", {"a": 1}, [1], "a state"])
def test_what_is_no_list_of_updates_is_one_line(given: Any) -> None:
    with pytest.raises(
        UpdateError, match=r"^updates: item 1 is a \w+; pass a list of ClientUpdate\(client_id, state\)$"
    ):
        aggregate([cohort(1)[0].state] if given == "a state" else given, "fedavg")


def test_a_method_that_is_no_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^aggregation method None: must be a name"):
        aggregate(cohort(2), None)  # type: ignore[arg-type]


def test_no_usable_update_is_an_error_that_says_why() -> None:
    with pytest.raises(UpdateError, match="none came"):
        aggregate([], "fedavg")
    with pytest.raises(UpdateError, match=r"0 usable updates.*client0: model.layers.0.v_proj: B is not finite"):
        aggregate([poisoned(client) for client in cohort(2)], "fedavg")


@pytest.mark.parametrize("method", EVERY)
def test_common_modules_alone_are_read_where_clients_have_others(method: str) -> None:
    clients = clients_for(method)
    first = min(clients[5].state)
    clients[5] = replace(clients[5], state=AdapterState({first: clients[5].state[first]}, clients[5].state.extras))
    result = aggregate(clients, method, partial_modules="common")
    assert result.quarantined == {}
    assert all(list(state) == [first] for state in (result.state, *result.personalised.values()))
    assert finite(result)
