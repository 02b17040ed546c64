"""Rules that clip, choose or weigh clients' changes, against their definitions on dense vectors."""
# SPDX-License-Identifier: Apache-2.0

from dataclasses import replace

import pytest
import torch
from sample_updates import SHAPES, cohort, dense, relative, same_bits, shares, turned

from fedlora_hf.aggregation import aggregate
from fedlora_hf.errors import ConfigError, RoundError, UpdateError
from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors

WHOLE = max(min(shape) for shape in SHAPES.values())
MIXED = {"ranks": (2, 4, 3), "scales": (2.0, 0.5)}
START = cohort(1, seed=11)[0].state
SERVER = cohort(1, seed=12)[0].state
RULES = ["norm_clipping", "centred_clipping", "bulyan", "fltrust"]


def vectors(clients: list[ClientUpdate], start: AdapterState | None) -> torch.Tensor:
    """(K, n): changes as dense vectors."""
    begin = 0 if start is None else dense(start)
    return torch.stack([dense(client.state) - begin for client in clients])


def back(change: torch.Tensor, start: AdapterState | None) -> torch.Tensor:
    return change if start is None else dense(start) + change


def scaled(client: ClientUpdate, factor: float) -> ClientUpdate:
    state = {m: f * factor for m, f in client.state.items()}
    return replace(client, state=AdapterState(state, client.state.extras))


def options_for(rule: str) -> dict[str, AdapterState]:
    return {"server": SERVER} if rule == "fltrust" else {}


@pytest.mark.parametrize("start", [None, START])
@pytest.mark.parametrize("bound", [None, 20.0, 1e9])
def test_norm_clipping_matches_dense(start: AdapterState | None, bound: float | None) -> None:
    clients = cohort(5, **MIXED)
    D, p = vectors(clients, start), shares(clients)
    norms = D.norm(dim=1)
    limit = norms.median() if bound is None else bound  # of an odd number: the middle one
    change = (p * (limit / norms).clamp(max=1)) @ D
    result = aggregate(clients, "norm_clipping", target_rank=WHOLE, reference=start, max_norm=bound)
    assert relative(dense(result.state), back(change, start)) < 1e-6
    assert list(result.diagnosis["norms"].values()) == pytest.approx(norms.tolist())
    assert result.diagnosis["max_norm"] == pytest.approx(float(limit))


def test_no_norm_above_the_bound_is_the_mean_of_the_products() -> None:
    clients = cohort(5)
    one = aggregate(clients, "norm_clipping", reference=START, max_norm=1e9)
    assert same_bits(one.state, aggregate(clients, "product_mean", reference=START).state)


def test_the_head_is_clipped_with_the_rest() -> None:
    clients = cohort(5)
    result = aggregate(clients, "norm_clipping", reference=START, max_norm=20.0)
    c = shares(clients) * torch.tensor([min(1.0, 20 / n) for n in result.diagnosis["norms"].values()])
    begin = START.extras["score.weight"].double()
    moves = [client.state.extras["score.weight"].double() - begin for client in clients]
    expected = begin + sum(w * move for w, move in zip(c, moves, strict=True))
    assert torch.allclose(result.state.extras["score.weight"].double(), expected, atol=1e-6)


@pytest.mark.parametrize("start", [None, START])
@pytest.mark.parametrize(("radius", "steps"), [(None, 3), (15.0, 1), (15.0, 4)])
def test_centred_clipping_matches_dense(start: AdapterState | None, radius: float | None, steps: int) -> None:
    clients = cohort(5, **MIXED)
    D, p = vectors(clients, start), shares(clients)
    v = torch.zeros_like(D[0])
    for _ in range(steps):
        distances = (D - v).norm(dim=1)
        limit = distances.median() if radius is None else radius
        v = v + (p * (limit / distances).clamp(max=1)) @ (D - v)
    result = aggregate(clients, "centred_clipping", target_rank=WHOLE, reference=start, radius=radius, steps=steps)
    assert relative(dense(result.state), back(v, start)) < 1e-6
    assert len(result.diagnosis["radii"]) == result.n_iter == steps
    assert sum(result.weights.values()) == pytest.approx(1)


@pytest.mark.parametrize("rule", ["norm_clipping", "centred_clipping"])
def test_a_client_gains_nothing_by_size(rule: str) -> None:
    """Past the bound a change a hundred times as long is the same change."""
    clients = cohort(7)
    ten, thousand = ([*clients[:6], scaled(clients[6], size)] for size in (10.0, 1000.0))
    one, two = aggregate(ten, rule).state, aggregate(thousand, rule).state
    assert relative(dense(one), dense(two)) < 0.05
    assert relative(dense(aggregate(ten, "product_mean").state), dense(two)) > 1


@pytest.mark.parametrize("f", [None, 0, 1])
def test_bulyan_matches_dense(f: int | None) -> None:
    clients, K = cohort(8, **MIXED), 8
    W = torch.stack([dense(client.state) for client in clients])
    f_used = 1 if f is None else f
    left, chosen = list(range(K)), []
    for _ in range(K - 2 * f_used):
        distances = torch.cdist(W[left], W[left], compute_mode="donot_use_mm_for_euclid_dist").square()
        nearest = max(len(left) - f_used - 2, 1)
        scores = distances.sort(1).values[:, 1 : nearest + 1].sum(1)
        chosen.append(left.pop(int(scores.argmin())))
    V = W[sorted(chosen)]
    centre = V.quantile(0.5, dim=0)
    near = (V - centre).abs().argsort(0)[: K - 4 * f_used]
    result = aggregate(clients, "bulyan", target_rank=WHOLE, num_contaminated=f)
    assert relative(dense(result.state), V.gather(0, near).mean(0)) < 1e-6
    assert {k for k, w in result.weights.items() if w} == {f"client{k}" for k in chosen}
    assert result.diagnosis == {"num_contaminated": f_used, "num_selected": K - 2 * f_used}


def test_bulyan_of_few_is_the_plain_mean() -> None:
    clients = cohort(6)
    mean = aggregate(clients, "product_mean", weight_by="uniform").state
    assert relative(dense(aggregate(clients, "bulyan", num_contaminated=5).state), dense(mean)) < 1e-6


def near(seed: int, count: int) -> list[ClientUpdate]:
    """Clients around one common update."""
    common = cohort(1)[0].state
    return [
        replace(
            client,
            state=AdapterState(
                {
                    m: LoraFactors(common[m].A + 0.1 * f.A, common[m].B + 0.1 * f.B, f.scale)
                    for m, f in client.state.items()
                },
                client.state.extras,
            ),
        )
        for client in cohort(count, seed=seed)
    ]


@pytest.mark.parametrize("rule", ["centred_clipping", "bulyan", "fltrust"])
@pytest.mark.parametrize("attack", ["flip", "boost"])
def test_two_attackers_of_eleven_move_the_result_little(rule: str, attack: str) -> None:
    clients = near(3, 11)
    options = {"server": cohort(1)[0].state} if rule == "fltrust" else {}
    honest = aggregate(clients, rule, weight_by="uniform", **options).state
    for k in (4, 7):
        clients[k] = scaled(clients[k], -1.0 if attack == "flip" else 30.0)
    found = aggregate(clients, rule, weight_by="uniform", **options).state
    mean = aggregate(clients, "product_mean", weight_by="uniform").state
    assert relative(dense(found), dense(honest)) < 0.5 * relative(dense(mean), dense(honest))
    assert relative(dense(found), dense(honest)) < 0.35


@pytest.mark.parametrize("start", [None, START])
def test_fltrust_matches_dense(start: AdapterState | None) -> None:
    clients = cohort(6, **MIXED)
    D = vectors(clients, start)
    g = dense(SERVER) - (0 if start is None else dense(start))
    trust = (D @ g / D.norm(dim=1) / g.norm()).clamp(min=0)
    change = (trust / D.norm(dim=1)) @ D * g.norm() / trust.sum()
    result = aggregate(clients, "fltrust", target_rank=WHOLE, reference=start, server=SERVER)
    assert relative(dense(result.state), back(change, start)) < 1e-6
    assert list(result.weights.values()) == pytest.approx((trust / trust.sum()).tolist())


def test_fltrust_needs_a_server_and_somebody_to_trust() -> None:
    with pytest.raises(ConfigError, match="fltrust needs an update trained on the server's own data"):
        aggregate(cohort(3), "fltrust")
    one = cohort(1)[0]
    with pytest.raises(RoundError, match="no client's change has a positive cosine"):
        aggregate([one], "fltrust", server=scaled(one, -1.0).state)
    first = next(iter(SERVER))
    with pytest.raises(UpdateError, match="the server's own update: wrong modules: 1 missing"):
        aggregate(cohort(3), "fltrust", server=AdapterState({first: SERVER[first]}, SERVER.extras))


@pytest.mark.parametrize("rule", RULES)
def test_these_rules_do_not_see_how_an_update_is_written(rule: str) -> None:
    clients = cohort(8)
    rewritten = [turned(client, seed=k) for k, client in enumerate(clients)]
    one, two = (aggregate(c, rule, reference=START, **options_for(rule)) for c in (clients, rewritten))
    assert relative(dense(two.state), dense(one.state)) < 1e-4
    assert list(one.weights.values()) == pytest.approx(list(two.weights.values()), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_the_scale_an_update_is_written_with_does_not_count(rule: str) -> None:
    clients = cohort(8)
    other = [
        replace(c, state=AdapterState({m: f.rescaled(0.25 + k) for m, f in c.state.items()}, c.state.extras))
        for k, c in enumerate(clients)
    ]
    one, two = (aggregate(c, rule, reference=START, **options_for(rule)) for c in (clients, other))
    assert relative(dense(two.state), dense(one.state)) < 1e-5


@pytest.mark.parametrize("rule", RULES)
def test_clients_that_changed_nothing_leave_the_start(rule: str) -> None:
    clients = [ClientUpdate(f"c{k}", START, 5) for k in range(4)]
    if rule == "fltrust":
        with pytest.raises(RoundError, match="no client's change"):
            aggregate(clients, rule, reference=START, server=SERVER)
        return
    result = aggregate(clients, rule, reference=START)
    assert relative(dense(result.state), dense(START)) < 1e-6


@pytest.mark.parametrize(
    ("rule", "options", "said"),
    [
        ("norm_clipping", {"max_norm": 0.0}, "max_norm=0.0: must be above 0"),
        ("centred_clipping", {"radius": float("nan")}, "radius=nan: must be above 0"),
        ("centred_clipping", {"steps": 0}, "steps=0: must be at least 1"),
        ("bulyan", {"num_contaminated": -1}, "num_contaminated=-1: must be at least 0"),
    ],
)
def test_bad_options_are_refused(rule: str, options: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        aggregate(cohort(4), rule, **options)
