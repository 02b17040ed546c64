"""Server optimizers: against torch's and the paper's formulas, on factors and on products."""
# SPDX-License-Identifier: Apache-2.0

from dataclasses import replace

import pytest
import torch
from sample_updates import SHAPES, cohort, dense, relative, same_bits, turned

from fedlora_hf.aggregation import aggregate
from fedlora_hf.aggregation.server_optimizer import server_rule, space_of, stepped
from fedlora_hf.errors import ConfigError
from fedlora_hf.methods import METHODS
from fedlora_hf.numerics.server_step import KINDS, Rule, step
from fedlora_hf.update import AdapterState, LoraFactors

STATES = [client.state for client in cohort(4, seed=2)]
WHOLE = max(min(shape) for shape in SHAPES.values())


def changes(seed: int = 0, count: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 4, generator=generator) for _ in range(count)]


def walked(rule: Rule, given: list[torch.Tensor]) -> torch.Tensor:
    """Where the server stands after rounds whose means lie so far from their starts."""
    x, state = torch.ones(3, 4), {}
    for change in given:
        x, state = step(rule, x, x + change, state)
    return x


@pytest.mark.parametrize(("rate", "momentum"), [(1.0, 0.9), (0.5, 0.5), (0.3, 0.0)])
def test_avgm_is_torch_s_sgd_with_momentum(rate: float, momentum: float) -> None:
    x = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = torch.optim.SGD([x], lr=rate, momentum=momentum)
    for change in changes():
        x.grad = -change
        optimizer.step()
    assert torch.allclose(walked(Rule("avgm", rate, momentum), changes()), x.detach(), atol=1e-5)


@pytest.mark.parametrize("kind", ["adam", "yogi", "adagrad"])
def test_adaptive_rules_are_the_paper_s_entry_by_entry(kind: str) -> None:
    rule = Rule(kind, 0.1, 0.8, 0.9, 0.05)
    found = walked(rule, changes())
    for i, j in ((0, 0), (2, 3)):
        x, m, v = 1.0, 0.0, 0.05**2
        for change in changes():
            d = float(change[i, j])
            m = 0.8 * m + 0.2 * d
            if kind == "adagrad":
                v += d * d
            elif kind == "adam":
                v = 0.9 * v + 0.1 * d * d
            else:
                v -= 0.1 * d * d * (1 if v > d * d else -1)
            x += 0.1 * m / (v**0.5 + 0.05)
        assert float(found[i, j]) == pytest.approx(x, abs=1e-5)


@pytest.mark.parametrize("space", ["factors", "product"])
def test_avgm_without_momentum_at_rate_one_is_the_method_itself_to_the_bit(space: str) -> None:
    rule = server_rule("avgm", 1.0, 0.0)
    assert rule is not None
    found = stepped(rule, space, STATES[0], STATES[1], {})  # type: ignore[arg-type]
    assert same_bits(found.state, STATES[1])
    assert found.memory == {}


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_stepped_whichever_way_they_are_written(kind: str) -> None:
    rule = server_rule(kind, 0.5)
    assert rule is not None
    one, two, memory, other = STATES[0], STATES[0], {}, {}
    for seed in range(3):
        new = cohort(1, seed=20 + seed)[0]
        one, memory, _ = stepped(rule, "product", one, new.state, memory)
        two, other, _ = stepped(rule, "product", two, turned(new, seed).state, other)
    assert relative(dense(two), dense(one)) < 1e-3


def test_momentum_of_products_is_exact_at_full_rank() -> None:
    rule = Rule("avgm", 0.7, 0.9)
    states = [AdapterState({m: f.padded(WHOLE) for m, f in s.items()}) for s in STATES]
    at, memory = states[0], {}
    W, M = dense(at), torch.zeros_like(dense(at))
    for new in states[1:]:
        M = 0.9 * M + dense(new) - W
        W = W + 0.7 * M
        at, memory, info = stepped(rule, "product", at, new, memory)
        assert relative(dense(at), W) < 1e-5
    assert all(entry["discarded_energy"] < 1e-10 for entry in info.values())


def test_a_step_past_the_rank_says_what_the_cut_loses() -> None:
    rule = Rule("adam", 0.1, 0.9)
    found = stepped(rule, "product", STATES[0], STATES[1], {})
    for module, info in found.modules.items():
        assert found.state[module].rank == info["rank"] == 4
        assert 0 < info["discarded_energy"] < 1
        assert found.memory[f"{module}:v"].shape == SHAPES[module]


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_factor_stays_and_keeps_its_momentum(kind: str) -> None:
    rule = server_rule(kind, 0.5)
    assert rule is not None
    begin = STATES[0]
    after_b = AdapterState({m: LoraFactors(f.A, STATES[1][m].B, f.scale) for m, f in begin.items()}, begin.extras)
    first = stepped(rule, "factors", begin, after_b, {}, ("B",))
    assert all(torch.equal(first.state[m].A, begin[m].A) for m in begin)
    second = stepped(rule, "factors", first.state, STATES[2], first.memory, ("A",))
    for module in begin:
        assert torch.equal(second.memory[f"{module}:B.m"], first.memory[f"{module}:B.m"])
        assert not torch.equal(second.state[module].A, STATES[2][module].A)
        assert torch.equal(second.state[module].B, STATES[2][module].B)


def test_heads_are_stepped_too() -> None:
    rule = Rule("avgm", 2.0, 0.5)
    found = stepped(rule, "product", STATES[0], STATES[1], {})
    start, new = (s.extras["score.weight"] for s in STATES[:2])
    assert torch.allclose(found.state.extras["score.weight"], start + 2 * (new - start), atol=1e-5)


def test_where_a_method_is_stepped() -> None:
    spaces = {}
    for name, method in METHODS.items():
        try:
            spaces[name] = space_of(method)
        except ConfigError:
            spaces[name] = None
    assert {name for name, space in spaces.items() if space is None} == {"stacking", "local", "fedex"}
    assert {name for name, space in spaces.items() if space == "factors"} == {
        "fedavg", "fedsa", "ffa", "rolora", "dirmag_mean",
    }  # fmt: skip


def test_a_run_of_rounds_with_momentum_does_not_depend_on_the_order_of_clients() -> None:
    rule = Rule("avgm", 1.0, 0.9)
    at, back, memory, other = STATES[0], STATES[0], {}, {}
    for seed in (5, 6):
        clients = [replace(c, num_examples=7) for c in cohort(5, seed=seed)]
        at, memory, _ = stepped(rule, "product", at, aggregate(clients, "product_mean", reference=at).state, memory)
        new = aggregate(clients[::-1], "product_mean", reference=back).state
        back, other, _ = stepped(rule, "product", back, new, other)
    assert same_bits(at, back)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "sgd"}, "server_optimizer='sgd': must be none or one of avgm, adam, yogi, adagrad"),
        ({"name": "adam", "learning_rate": 0.0}, "server_learning_rate=0.0: must be above 0"),
        ({"name": "avgm", "momentum": 1.0}, "server_momentum=1.0: must be at least 0 and below 1"),
        ({"name": "yogi", "beta2": -0.1}, "server_beta2=-0.1"),
        ({"name": "adam", "tau": float("nan")}, "server_tau=nan: must be above 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        server_rule(**options)  # type: ignore[arg-type]
    assert said in str(caught.value)


def test_no_optimizer_is_none() -> None:
    assert server_rule("none") is None
