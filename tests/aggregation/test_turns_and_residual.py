"""fedex: exact by its residual; rolora: exact by turns."""
# SPDX-License-Identifier: Apache-2.0

from dataclasses import replace

import pytest
import torch
from sample_updates import SHAPES, cohort, dense, relative, same_bits, shares, with_common_factor

from fedlora_hf.aggregation import aggregate
from fedlora_hf.errors import UpdateError
from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors

MIXED = {"ranks": (2, 4, 3), "scales": (2.0, 0.5)}


def with_common_output(clients: list[ClientUpdate]) -> list[ClientUpdate]:
    """The same clients, all with the first one's B."""
    common = clients[0].state
    return [
        replace(
            c,
            state=AdapterState({m: LoraFactors(f.A, common[m].B, f.scale) for m, f in c.state.items()}, c.state.extras),
        )
        for c in clients
    ]


@pytest.mark.parametrize("settings", [{}, MIXED, {"scales": (0.25,)}])
def test_fedex_is_the_exact_mean_of_the_products(settings: dict[str, tuple[float, ...]]) -> None:
    """Also where alpha / r is not 1, and where ranks and weights differ."""
    clients = cohort(5, **settings)
    result = aggregate(clients, "fedex")
    expected = shares(clients) @ torch.stack([dense(client.state) for client in clients])
    assert relative(dense(result.state), expected) < 1e-6


def test_fedex_holds_the_mean_of_the_factors_in_its_first_rows() -> None:
    clients = cohort(5, **MIXED)
    exact, mean = aggregate(clients, "fedex"), aggregate(clients, "fedavg")
    for module, factors in mean.state.items():
        found = exact.state[module]
        assert torch.equal(found.A[: factors.rank], factors.A)
        assert torch.equal(found.B[:, : factors.rank], factors.B)
        assert found.scale == factors.scale
        rest = exact.modules[module]
        assert found.rank == factors.rank + rest["residual_rank"]
        missed = found.dense(torch.float64) - factors.dense(torch.float64)
        expected = float((missed.norm() / found.dense(torch.float64).norm()) ** 2)
        assert rest["residual_energy"] == pytest.approx(expected, rel=1e-5)
        assert rest["residual_rank"] <= min(SHAPES[module])


def test_fedex_has_no_residual_where_one_factor_is_common() -> None:
    for clients in (with_common_factor(cohort(4)), with_common_output(cohort(4)), cohort(1)):
        result = aggregate(clients, "fedex")
        assert {info["residual_rank"] for info in result.modules.values()} == {0}
        assert same_bits(result.state, aggregate(clients, "fedavg").state)


def test_fedex_reports_what_a_plain_adapter_cannot_hold() -> None:
    clients = cohort(5)
    result = aggregate(clients, "fedex", target_rank=4)
    best = aggregate(clients, "product_mean", target_rank=4)
    assert relative(dense(result.state), dense(best.state)) < 1e-5
    for module, info in result.modules.items():
        assert info["discarded_energy"] == pytest.approx(best.modules[module]["discarded_energy"], rel=1e-4)


@pytest.mark.parametrize(("make", "factor"), [(with_common_factor, "A"), (with_common_output, "B")])
def test_rolora_is_exact_whichever_factor_is_frozen(make: object, factor: str) -> None:
    clients = make(cohort(4))  # type: ignore[operator]
    result = aggregate(clients, "rolora")
    expected = shares(clients) @ torch.stack([dense(client.state) for client in clients])
    assert relative(dense(result.state), expected) < 1e-6
    for module in SHAPES:
        assert torch.equal(getattr(result.state[module], factor), getattr(clients[0].state[module], factor))


def test_rolora_takes_the_round_s_common_factor_from_its_start() -> None:
    clients = with_common_output(cohort(4))
    start = clients[0].state
    strange = replace(clients[2], state=cohort(1, seed=5)[0].state)
    result = aggregate([*clients[:2], strange, clients[3]], "rolora", reference=start)
    assert result.quarantined == {
        "client2": "B of model.layers.0.q_proj is not the common one: rolora needs one frozen B"
    }
    alone = aggregate([*clients[:2], clients[3]], "rolora", reference=start)
    assert same_bits(result.state, alone.state)


def test_rolora_refuses_a_cohort_that_trained_both() -> None:
    with pytest.raises(UpdateError, match=r"client2: A of .* is not the common one: rolora needs one frozen A"):
        aggregate(cohort(3), "rolora")


def test_a_common_b_under_two_scales_is_not_common() -> None:
    clients = with_common_output(cohort(4, scales=(2.0, 0.5)))
    result = aggregate(clients, "rolora")
    assert sorted(result.quarantined) == ["client1", "client3"]
