"""TIES and DARE in product space: against PEFT's and mergekit's definitions, and for ranks that differ."""
# SPDX-License-Identifier: Apache-2.0

import models
import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import merge_utils
from sample_updates import SHAPES, cohort, dense, relative, same_bits, shares, turned

from fedlora_hf.aggregation import aggregate
from fedlora_hf.errors import ConfigError
from fedlora_hf.numerics import merging
from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors

WHOLE = max(min(shape) for shape in SHAPES.values())
MIXED = {"ranks": (2, 4, 3), "scales": (2.0, 0.5)}


def by_module(clients: list[ClientUpdate], module: str) -> list[torch.Tensor]:
    return [client.state[module].dense(torch.float64) for client in clients]


@pytest.mark.parametrize("density", [0.99, 0.5, 0.2])
@pytest.mark.parametrize("ranks", [(4,), (2, 4, 3)])
def test_ties_of_clients_that_weigh_alike_is_peft_s(density: float, ranks: tuple[int, ...]) -> None:
    """PEFT merges products too ("ties_svd"); its weights are 1 each, and it divides by how many agree."""
    clients = cohort(5, ranks=ranks)
    result = aggregate(clients, "ties", weight_by="uniform", density=density, target_rank=WHOLE)
    for module in SHAPES:
        expected = merge_utils.ties(by_module(clients, module), torch.ones(5, dtype=torch.float64), density)
        assert relative(result.state[module].dense(torch.float64), expected) < 1e-6


@pytest.mark.parametrize("rank", [3, 8])
def test_ties_is_peft_s_add_weighted_adapter(rank: int) -> None:
    """Of the adapters of one model: "ties_svd" merges products and cuts them to `svd_rank` too."""
    model = get_peft_model(models.tiny_llama(), LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"]), "ada")
    for name in ("bob", "eve"):
        model.add_adapter(name, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"]))
    generator, clients = torch.Generator().manual_seed(3), []
    for name in ("ada", "bob", "eve"):
        factors = {}
        for module, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                A, B = layer.lora_A[name].weight.data, layer.lora_B[name].weight.data
                A.copy_(torch.randn(A.shape, generator=generator))
                B.copy_(torch.randn(B.shape, generator=generator))
                factors[module] = LoraFactors(A.clone(), B.clone(), layer.scaling[name])
        clients.append(ClientUpdate(name, AdapterState(factors)))
    # PEFT 0.20 counts an adapter's scale, here 2, a second time with its weight.
    weight = 0.5 if peft.__version__.startswith("0.20.") else 1.0
    model.add_weighted_adapter(["ada", "bob", "eve"], [weight] * 3, "merged", "ties_svd", svd_rank=rank, density=0.5)
    found = aggregate(clients, "ties", density=0.5, target_rank=rank).state
    for module, factors in found.items():
        expected = model.get_submodule(module).get_delta_weight("merged")
        assert relative(factors.dense(), expected) < 1e-4


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_ties_with_weights_by_definition(density: float) -> None:
    """Entry by entry, in plain Python, as mergekit defines it with weights and `normalize`."""
    clients = cohort(4, **MIXED)
    p, module = shares(clients).tolist(), "model.layers.0.v_proj"
    W = by_module(clients, module)
    kept = int(density * W[0].numel())
    limits = [sorted(w.abs().flatten().tolist())[-kept] for w in W]
    expected = torch.zeros_like(W[0])
    for i in range(W[0].shape[0]):
        for j in range(W[0].shape[1]):
            values = [
                float(w[i, j]) if abs(float(w[i, j])) >= limit else 0.0 for w, limit in zip(W, limits, strict=True)
            ]
            total = sum(a * v for a, v in zip(p, values, strict=True))
            agree = [(a, v) for a, v in zip(p, values, strict=True) if v * total > 0]
            expected[i, j] = sum(a * v for a, v in agree) / sum(a for a, _ in agree) if agree else 0.0
    found = aggregate(clients, "ties", density=density, target_rank=WHOLE).state[module]
    assert relative(found.dense(torch.float64), expected) < 1e-6


def test_ties_keeps_exactly_the_largest_share_and_is_idempotent() -> None:
    W = torch.randn(13, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    limit, one = merging.trim_threshold(W, 0.3), torch.ones(1, dtype=torch.float64)
    once = merging.ties(W[None], one, torch.tensor([limit], dtype=torch.float64))
    assert int((once != 0).sum()) == int(0.3 * W.numel())
    again = merging.ties(once[None], one, torch.tensor([merging.trim_threshold(once, 0.3)], dtype=torch.float64))
    assert torch.equal(once, again)
    assert merging.trim_threshold(W, 1.0) == 0.0


def test_ties_of_opposites_of_one_weight_is_nothing() -> None:
    one = cohort(1)[0]
    other = AdapterState({m: -f for m, f in one.state.items()}, one.state.extras)
    result = aggregate([one, ClientUpdate("mirror", other, one.num_examples)], "ties")
    assert float(dense(result.state).abs().max()) == 0.0


@pytest.mark.parametrize("options", [{"density": 0.4}, {}])
@pytest.mark.parametrize("method", ["ties", "dare"])
def test_merging_does_not_depend_on_the_order_or_on_blocks(
    method: str, options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = cohort(6, **MIXED)
    one = aggregate(clients, method, **options).state
    assert same_bits(one, aggregate(clients[::-1], method, **options).state)
    monkeypatch.setattr("fedlora_hf.aggregation.shared.BLOCK", 5 * 20 * 6)
    assert relative(dense(aggregate(clients, method, **options).state), dense(one)) < 1e-6


@pytest.mark.parametrize("method", ["ties", "dare"])
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_merging_does_not_see_how_an_update_is_written(method: str, density: float) -> None:
    clients = cohort(6)
    rewritten = [turned(client, seed=k) for k, client in enumerate(clients)]
    one, two = (aggregate(c, method, density=density, target_rank=WHOLE).state for c in (clients, rewritten))
    assert relative(dense(two), dense(one)) < 1e-3


def test_dare_that_drops_nothing_is_the_product_mean_to_the_bit() -> None:
    clients = cohort(5, **MIXED)
    one, two = aggregate(clients, "dare"), aggregate(clients, "product_mean")
    assert same_bits(one.state, two.state)
    assert one.modules == two.modules


def test_dare_keeps_its_share_enlarged_and_is_the_mean_in_expectation() -> None:
    W = torch.randn(30, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = torch.stack([merging.dropped(W, 0.25, seed) for seed in range(400)])
    kept = draws != 0
    assert torch.allclose(draws[kept], (W.expand_as(draws) / 0.25)[kept])
    assert float(kept.double().mean()) == pytest.approx(0.25, abs=0.005)
    # Standard error of a mean of 400 draws: |W| sqrt(3 / 400), 0.087 |W|.
    assert relative(draws.mean(0), W) == pytest.approx(0.087, abs=0.01)


def test_dare_s_draws_follow_from_seed_client_and_module() -> None:
    clients = cohort(5)
    one, two, other = (aggregate(clients, "dare", density=0.5, seed=seed).state for seed in (0, 0, 1))
    assert same_bits(one, two)
    assert relative(dense(other), dense(one)) > 0.1
    alone = aggregate(clients[:1], "dare", density=0.5, target_rank=WHOLE).state
    W = clients[0].state["model.layers.0.q_proj"].dense(torch.float64)
    found = alone["model.layers.0.q_proj"].dense(torch.float64)
    kept = found.abs() > 1e-4
    assert torch.allclose(found[kept], 2 * W[kept], rtol=1e-3)


@pytest.mark.parametrize("method", ["ties", "dare"])
@pytest.mark.parametrize("density", [0.0, 1.5, float("nan")])
def test_a_density_that_is_no_share_is_refused(method: str, density: float) -> None:
    with pytest.raises(ConfigError, match=r"density=.*: must be above 0 and at most 1"):
        aggregate(cohort(2), method, density=density)
