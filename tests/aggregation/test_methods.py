"""Each method against its definition on dense matrices."""
# SPDX-License-Identifier: Apache-2.0

from dataclasses import replace

import pytest
import torch
from sample_updates import SHAPES, cohort, dense, relative, same_bits, shares, turned, with_common_factor

from fedlora_hf.aggregation import aggregate
from fedlora_hf.errors import ConfigError, ConvergenceWarning, UpdateError
from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors

FULL = min(min(shape) for shape in SHAPES.values())  # v_proj
WHOLE = max(min(shape) for shape in SHAPES.values())  # enough for every module
MIXED = {"ranks": (2, 4, 3), "scales": (2.0, 0.5)}


def stack(clients: list[ClientUpdate]) -> torch.Tensor:
    return torch.stack([dense(client.state) for client in clients])


def test_fedavg_means_each_factor_by_examples() -> None:
    clients = cohort(4)
    result = aggregate(clients, "fedavg")
    p = shares(clients)
    for module, found in result.state.items():
        parts = [client.state[module] for client in clients]
        assert torch.allclose(found.A.double(), sum(w * f.A.double() for w, f in zip(p, parts, strict=True)), atol=1e-6)
        assert torch.allclose(found.B.double(), sum(w * f.B.double() for w, f in zip(p, parts, strict=True)), atol=1e-6)
    head = sum(w * client.state.extras["score.weight"].double() for w, client in zip(p, clients, strict=True))
    assert torch.allclose(result.state.extras["score.weight"].double(), head, atol=1e-6)
    assert list(result.weights.values()) == pytest.approx(p.tolist())


def test_fedavg_pads_ranks_and_evens_out_scales() -> None:
    clients = cohort(2, **MIXED)
    found = aggregate(clients, "fedavg", weight_by="uniform").state["model.layers.0.q_proj"]
    one, two = (client.state["model.layers.0.q_proj"] for client in clients)
    A = (one.padded(4).A + two.A) / 2
    B = (one.padded(4).rescaled(1.0).B + two.rescaled(1.0).B) / 2
    assert found.scale == 1.0
    assert torch.allclose(found.A, A, atol=1e-6)
    assert torch.allclose(found.B, B, atol=1e-6)


def test_fedavg_depends_on_how_an_update_is_written() -> None:
    clients = cohort(3)
    other = aggregate([clients[0], turned(clients[1]), clients[2]], "fedavg").state
    assert relative(dense(other), dense(aggregate(clients, "fedavg").state)) > 0.1


@pytest.mark.parametrize("method", ["fedavg", "fedsa", "stacking"])
def test_a_lower_target_rank_is_the_best_cut_of_the_result(method: str) -> None:
    clients = cohort(3)
    whole, cut = aggregate(clients, method), aggregate(clients, method, target_rank=2)
    for module in SHAPES:
        expected, lost = whole.state[module].truncated(2, 2.0)
        assert cut.state[module].rank == cut.modules[module]["rank"] == 2
        assert relative(cut.state[module].dense(), expected.dense()) < 1e-5
        assert cut.modules[module]["discarded_energy"] == pytest.approx(lost)
        assert whole.modules[module]["discarded_energy"] == 0.0


def test_product_mean_at_full_rank_is_the_dense_mean() -> None:
    clients = cohort(6, **MIXED)
    result = aggregate(clients, "product_mean", target_rank=WHOLE)
    assert relative(dense(result.state), shares(clients) @ stack(clients)) < 1e-6
    assert all(info["discarded_energy"] < 1e-12 for info in result.modules.values())


def test_product_mean_cuts_to_the_largest_rank_and_records_the_loss() -> None:
    clients = cohort(6, **MIXED)
    result = aggregate(clients, "product_mean")
    for module in SHAPES:
        W = sum(w * c.state[module].dense(torch.float64) for w, c in zip(shares(clients), clients, strict=True))
        energy = torch.linalg.svdvals(W).square()
        info, found = result.modules[module], result.state[module]
        assert found.rank == info["rank"] == 4
        assert info["discarded_energy"] == pytest.approx(float(energy[4:].sum() / energy.sum()))
        assert info["spectrum"][:4] == pytest.approx(energy.sqrt()[:4].tolist())
        assert float((W - found.dense(torch.float64)).norm() ** 2) == pytest.approx(float(energy[4:].sum()), rel=1e-4)


def test_stacking_is_the_sum_of_products_and_ranks_add_up() -> None:
    clients = cohort(5, **MIXED)
    result = aggregate(clients, "stacking")
    assert relative(dense(result.state), shares(clients) @ stack(clients)) < 1e-6
    assert all(found.rank == sum(c.state[m].rank for c in clients) for m, found in result.state.items())


def test_ffa_is_exact_because_one_factor_is_common() -> None:
    clients = with_common_factor(cohort(4))
    result = aggregate(clients, "ffa")
    assert relative(dense(result.state), shares(clients) @ stack(clients)) < 1e-6
    assert all(torch.equal(result.state[m].A, clients[0].state[m].A) for m in SHAPES)
    assert relative(dense(aggregate(clients, "product_mean").state), dense(result.state)) < 1e-6


def test_ffa_takes_a_client_that_sends_bfloat16() -> None:
    clients = with_common_factor(cohort(3))
    half = {module: f.to(torch.bfloat16) for module, f in clients[2].state.items()}
    clients[2] = replace(clients[2], state=AdapterState(half, clients[2].state.extras))
    assert torch.equal(
        aggregate(clients, "ffa").state["model.layers.0.q_proj"].A, clients[0].state["model.layers.0.q_proj"].A
    )


def trained_both(client: ClientUpdate) -> ClientUpdate:
    other = {module: LoraFactors(f.A * 1.001, f.B, f.scale) for module, f in client.state.items()}
    return replace(client, state=AdapterState(other, client.state.extras))


@pytest.mark.parametrize("place", [0, 1, 3])
def test_ffa_quarantines_a_client_that_trained_both(place: int) -> None:
    """Wherever it stands in the alphabet: the common A is that of most, not that of the first."""
    clients = with_common_factor(cohort(4))
    honest = [client for number, client in enumerate(clients) if number != place]
    clients[place] = trained_both(clients[place])
    result = aggregate(clients, "ffa")
    reason = "A of model.layers.0.q_proj is not the common one: ffa needs one frozen A"
    assert result.quarantined == {clients[place].client_id: reason}
    alone = aggregate(honest, "ffa")
    assert same_bits(result.state, alone.state)
    assert result.weights == alone.weights
    common = with_common_factor(cohort(1))[0].state
    assert set(aggregate(clients, "ffa", reference=common).quarantined) == {clients[place].client_id}


def test_ffa_refuses_clients_without_a_common_factor() -> None:
    with pytest.raises(UpdateError, match=r"client2: A of .* is not the common one: ffa needs one frozen A; train B"):
        aggregate(cohort(3), "ffa")
    with pytest.raises(UpdateError, match="client2: A of"):
        aggregate(with_common_factor(cohort(3)), "ffa", reference=cohort(1, seed=9)[0].state)


def test_fedsa_gives_each_client_its_own_output_factor() -> None:
    clients = cohort(4, **MIXED)
    result = aggregate(clients, "fedsa")
    assert list(result.personalised) == [client.client_id for client in clients]
    mean = aggregate(clients, "fedavg").state
    for client in clients:
        own = result.personalised[client.client_id]
        assert torch.equal(own.extras["score.weight"], client.state.extras["score.weight"])
        for module, sent in client.state.items():
            assert torch.equal(own[module].B, sent.B)
            assert torch.equal(own[module].A, mean[module].A[: sent.rank])
            assert own[module].scale == sent.scale
    assert torch.equal(dense(result.state), dense(mean))


@pytest.mark.parametrize(("method", "options", "drop"), [("median", {}, None), ("trimmed_mean", {"trim": 0.3}, 2)])
@pytest.mark.parametrize("count", [7, 8])
def test_coordinatewise_methods_match_dense(
    method: str, options: dict[str, float], drop: int | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = cohort(count, **MIXED)
    ordered = stack(clients).sort(0).values
    drop = (count - 1) // 2 if drop is None else drop
    expected = ordered[drop : count - drop].mean(0)
    result = aggregate(clients, method, target_rank=WHOLE, **options)
    assert relative(dense(result.state), expected) < 1e-6
    heads = torch.stack([client.state.extras["score.weight"].double() for client in clients]).sort(0).values
    assert torch.allclose(result.state.extras["score.weight"].double(), heads[drop : count - drop].mean(0), atol=1e-6)
    # Block by block it is the same matrix.
    monkeypatch.setattr("fedlora_hf.aggregation.shared.BLOCK", 5 * 20 * count)
    blocks = aggregate(clients, method, target_rank=WHOLE, **options)
    assert relative(dense(blocks.state), expected) < 1e-6


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("chosen", [{}, {"num_contaminated": 1, "num_selected": 3}])
def test_multikrum_matches_dense(chosen: dict[str, int], normalise: bool) -> None:
    clients = cohort(8, **MIXED)
    W, K = stack(clients), 8
    seen = W / W.norm(dim=1, keepdim=True) if normalise else W
    f = chosen.get("num_contaminated", 2)
    distances = torch.cdist(seen, seen, compute_mode="donot_use_mm_for_euclid_dist").square()
    scores = distances.sort(1).values[:, 1 : K - f - 1].sum(1)
    best = scores.argsort()[: chosen.get("num_selected", K - f)]
    p = torch.zeros(K, dtype=torch.float64)
    p[best] = shares(clients)[best] / shares(clients)[best].sum()
    result = aggregate(clients, "multikrum", target_rank=WHOLE, normalise=normalise, **chosen)
    assert list(result.weights.values()) == pytest.approx(p.tolist())
    assert relative(dense(result.state), p @ W) < 1e-6
    assert list(result.diagnosis["krum_scores"].values()) == pytest.approx(scores.tolist())
    assert result.flagged == ()


def test_multikrum_leaves_out_the_boosted_and_the_random() -> None:
    common = cohort(1)[0].state
    clients = []
    for client in cohort(9, seed=3):
        near = {
            m: LoraFactors(common[m].A + 0.1 * f.A, common[m].B + 0.1 * f.B, f.scale) for m, f in client.state.items()
        }
        clients.append(replace(client, state=AdapterState(near, client.state.extras)))
    clients[4] = replace(
        clients[4], state=AdapterState({m: f * 10 for m, f in clients[4].state.items()}, clients[4].state.extras)
    )
    clients[7] = replace(clients[7], state=cohort(1, seed=99)[0].state)
    weights = aggregate(clients, "multikrum").weights
    assert weights["client4"] == weights["client7"] == 0
    assert sum(weights.values()) == pytest.approx(1)


def test_multikrum_caps_what_a_small_cohort_cannot_give() -> None:
    result = aggregate(cohort(4), "multikrum", num_contaminated=9, num_selected=9)
    assert (result.diagnosis["num_contaminated"], result.diagnosis["num_selected"]) == (0, 4)
    assert all(weight > 0 for weight in result.weights.values())


def test_geometric_median_matches_dense_weiszfeld() -> None:
    clients = cohort(7, **MIXED)
    W, p = stack(clients), shares(clients)
    v = p @ W
    for _ in range(2000):
        beta = p / (W - v).norm(dim=1)
        v = beta @ W / beta.sum()
    result = aggregate(clients, "geometric_median", target_rank=WHOLE)
    assert result.converged
    assert result.n_iter > 1
    assert relative(dense(result.state), v) < 1e-6
    expected = (beta / beta.sum()).tolist()
    assert list(result.weights.values()) == pytest.approx(expected, rel=1e-5)


def test_geometric_median_warns_when_stopped_early() -> None:
    with pytest.warns(ConvergenceWarning, match="max_iterations=2"):
        result = aggregate(cohort(6), "geometric_median", max_iterations=2)
    assert not result.converged


@pytest.mark.parametrize(
    "method", ["product_mean", "stacking", "median", "trimmed_mean", "multikrum", "geometric_median"]
)
def test_product_methods_do_not_see_how_an_update_is_written(method: str) -> None:
    """A -> R A, B -> B R^-1 is the same update; a rule that looks at products must not notice."""
    clients = cohort(6)
    rewritten = [turned(client, seed=k) for k, client in enumerate(clients)]
    one, two = aggregate(clients, method), aggregate(rewritten, method)
    assert relative(dense(two.state), dense(one.state)) < 1e-4
    assert list(one.weights.values()) == pytest.approx(list(two.weights.values()), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("trimmed_mean", {"trim": 0.7}, "trim=0.7: must be at least 0 and below 0.5"),
        ("trimmed_mean", {"trim": float("nan")}, "trim=nan"),
        ("trimmed_mean", {"trim": "0.1"}, "trim='0.1': must be of type float"),
        ("trimmed_mean", {"trim": True}, "trim=True"),
        ("multikrum", {"num_contaminated": -1}, "num_contaminated=-1"),
        ("multikrum", {"num_contaminated": 1.5}, "num_contaminated=1.5"),
        ("multikrum", {"num_selected": 0}, "num_selected=0"),
        ("multikrum", {"normalise": 1}, "normalise=1"),
        ("geometric_median", {"tolerance": 0.0}, "tolerance=0.0"),
        ("geometric_median", {"max_iterations": 0}, "max_iterations=0"),
        ("median", {"trim": 0.1}, "option 'trim' of method 'median': its options are: none"),
        ("multikrum", {"f": 1}, "num_contaminated, num_selected, normalise"),
    ],
)
def test_bad_options_are_refused_in_one_line(method: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        aggregate(cohort(4), method, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
