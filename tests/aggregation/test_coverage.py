"""Clients of different modules: zeros for what is missing, and what each way costs."""
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from fedlora_hf.aggregation import aggregate
from fedlora_hf.aggregation.coverage import costs, filled, told
from fedlora_hf.errors import UpdateError
from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors


def update(client: str, *modules: str, seed: int = 0, scale: float = 2.0, value: float = 1.0) -> ClientUpdate:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        module: LoraFactors(
            torch.randn(2, 6, generator=generator), value * torch.randn(5, 2, generator=generator), scale
        )
        for module in modules
    }
    return ClientUpdate(client, AdapterState(factors))


def test_what_is_missing_counts_as_no_change() -> None:
    """The mean over all three, a client without the module adding nothing to the sum."""
    updates = [update("a", "m", "n", seed=1), update("b", "m", seed=2), update("c", "m", "n", seed=3)]
    result = aggregate(updates, "product_mean", partial_modules="zero", target_rank=6)
    assert result.quarantined == {}
    expected = (updates[0].state["n"].dense() + updates[2].state["n"].dense()) / 3
    torch.testing.assert_close(result.state["n"].dense(), expected.to(result.state["n"].dense()), atol=1e-6, rtol=1e-5)


def test_the_result_does_not_depend_on_the_order() -> None:
    updates = [update(client, *modules, seed=ord(client)) for client, modules in (("a", "mn"), ("b", "n"), ("c", "mk"))]
    one = aggregate(updates, "fedavg", partial_modules="zero")
    two = aggregate(updates[::-1], "fedavg", partial_modules="zero")
    assert list(one.state) == ["k", "m", "n"]
    assert all(torch.equal(one.state[module].A, two.state[module].A) for module in one.state)


def test_an_unusable_client_adds_no_module() -> None:
    bad = update("bad", "m", "strange", value=float("nan"))
    result = aggregate([update("a", "m", seed=1), bad, update("c", "m", seed=3)], "fedavg", partial_modules="zero")
    assert list(result.state) == ["m"]
    assert list(result.quarantined) == ["bad"]


def test_where_all_are_alike_nothing_is_filled_or_told() -> None:
    updates = [update("a", "m", seed=1), update("b", "m", seed=2)]
    assert filled(updates) == updates
    assert costs(updates) == {}
    plain = aggregate(updates, "fedavg")
    for choice in ("zero", "refuse", "common"):
        other = aggregate(updates, "fedavg", partial_modules=choice)  # type: ignore[arg-type]
        assert torch.equal(other.state["m"].A, plain.state["m"].A)


def test_costs_of_each_choice() -> None:
    updates = [update("a", "m", "n", seed=1), update("b", "m", seed=2), update("c", "m", "n", seed=3)]
    found = costs(updates)
    assert found["quarantine"] == {"clients": ["b"]}
    whole = sum(u.state[module].norm() ** 2 for u in updates for module in u.state)
    lost = sum(u.state["n"].norm() ** 2 for u in updates if "n" in u.state)
    assert found["common"]["modules"] == ["n"]
    assert found["common"]["share_of_norm"] == pytest.approx(lost / whole)
    assert found["zero"] == {"pairs": 1, "share": pytest.approx(1 / 3)}
    assert any("leaves out 1 clients (b) (chosen)" in line for line in told(found, "quarantine"))


def test_refuse_names_a_module_and_who_lacks_it() -> None:
    with pytest.raises(UpdateError, match="1 modules are not in all updates, n not in b's"):
        aggregate([update("a", "m", "n"), update("b", "m")], "fedavg", partial_modules="refuse")
