"""What clients count in the mean: the three factors, attackers below the flags' line, clean cohorts, and the bits."""
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch
from torch import Tensor

from fedlora_hf.numerics.clair import Clair, ClairResult
from fedlora_hf.numerics.clair.consensus import chance_agreement, consensus, cosines
from fedlora_hf.numerics.clair.influence import clips, look_alikes, taper

OUT, IN, K, BAD = 40, 32, 12, 4


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def unit(W: Tensor) -> Tensor:
    return W / W.norm()


def honest(seed: int, count: int = K - BAD, own: float = 1.0) -> list[Tensor]:
    """A common low-rank part of norm 1, a part of one's own of norm `own` in the same column space, a little noise."""
    g = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(normal(g, OUT, 3))[0]
    common = unit(U @ normal(g, 3, IN))
    return [common + own * unit(U @ normal(g, 3, IN)) + 0.3 * unit(normal(g, OUT, IN)) for _ in range(count)]


def attack(kind: str, updates: list[Tensor], seed: int) -> list[Tensor]:
    """BAD updates that know all honest ones."""
    g = torch.Generator().manual_seed(1000 + seed)
    stacked = torch.stack(updates)
    mean, spread = stacked.mean(0), stacked.std(0)
    size = float(stacked.flatten(1).norm(dim=1).median())
    wrong = unit(normal(g, OUT, 2) @ normal(g, 2, IN))
    wrong = unit(wrong - (wrong * unit(mean)).sum() * unit(mean))

    def hugging(norm: float) -> Tensor:
        """At 0.8 of the way to a stranger: a cosine of a fifth of what honest clients have to their mean."""
        cosine = 0.2 * float(torch.stack([(unit(W) * unit(mean)).sum() for W in updates]).mean())
        return norm * size * (cosine * unit(mean) + (1 - cosine**2) ** 0.5 * wrong)

    def furthest(direction: Tensor) -> Tensor:
        """Min-max (Shejwalkar and Houmansadr 2021): as far off the mean as the two honest clients furthest apart."""
        most = float(torch.cdist(stacked.flatten(1), stacked.flatten(1)).max())
        steps = [s / 100 for s in range(2000)]
        far = [max(float((mean + s * direction - W).norm()) for W in updates) for s in steps]
        return mean + max(s for s, off in zip(steps, far, strict=True) if off <= most) * direction

    little = mean - 1.5 * spread
    makers = {
        "hugging": lambda: hugging(1.0) + 0.1 * size * unit(normal(g, OUT, IN)),
        "hugging, large": lambda: hugging(4.5) + 0.1 * size * unit(normal(g, OUT, IN)),
        "little, noisy": lambda: little + 0.15 * float(little.norm()) * unit(normal(g, OUT, IN)),
        "min-max": lambda: furthest(-unit(spread)) + 0.05 * unit(normal(g, OUT, IN)),
        "colluders": lambda: size * unit(wrong + 0.35 * unit(normal(g, OUT, IN)) + 0.3 * unit(mean)),
        "flip": lambda: -updates[0] + 0.1 * unit(normal(g, OUT, IN)),
    }
    return [makers[kind]() for _ in range(BAD)]


def damage(found: ClairResult, updates: list[Tensor]) -> float:
    benign = torch.stack(updates).mean(0)
    return float((found.matrix() - benign).norm() / benign.norm())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("kind", "most"),
    [
        ("hugging", 0.05),
        ("hugging, large", 0.05),
        ("little, noisy", 0.45),
        ("min-max", 0.35),
        ("colluders", 0.25),
        ("flip", 0.05),
    ],
)
def test_attackers_below_the_line_do_less_than_under_the_plain_rule(kind: str, most: float, seed: int) -> None:
    """Where they point elsewhere next to nothing is left of them; those that stay among the honest share a weight."""
    updates = honest(seed)
    sent = updates + attack(kind, updates, seed)
    found, plain = Clair(refine="none").fit(sent), Clair(refine="none", influence="flags").fit(sent)
    assert found.flagged == plain.flagged
    assert damage(found, updates) < most
    if found.flagged:  # the plain rule then has the mean of the honest, which a weight can only come near to
        assert damage(plain, updates) < 1e-6
    else:
        assert damage(found, updates) < 0.8 * damage(plain, updates)


@pytest.mark.parametrize("seed", range(3))
def test_norms_near_the_line_do_several_times_less(seed: int) -> None:
    """Nobody is flagged under either rule, and none of the attackers is a copy."""
    updates = honest(seed)
    sent = updates + attack("hugging, large", updates, seed)
    plain, found = Clair(refine="none", influence="flags").fit(sent), Clair(refine="none").fit(sent)
    assert plain.flagged == found.flagged == ()
    assert damage(plain, updates) > 1 > 5 * damage(found, updates)
    assert plain.influence == dict.fromkeys(plain.ids, 1.0)


@pytest.mark.parametrize("own", [0.5, 1.0, 2.0])
def test_clean_clients_keep_most_of_their_influence(own: float) -> None:
    for seed in range(3):
        updates = honest(seed, K, own)
        found = Clair(refine="none").fit(updates)
        assert damage(found, updates) < 0.25
        assert found.flagged == ()
        assert sum(found.influence.values()) > 0.7 * K


def test_unrelated_clients_count_alike() -> None:
    """Where clients share nothing no evidence is usable, and nobody loses influence on it."""
    g = torch.Generator().manual_seed(0)
    updates = [unit(normal(g, OUT, 1) @ normal(g, 1, IN)) for _ in range(K)]
    found = Clair(refine="none").fit(updates)
    assert found.diagnosis["direction_usable"] is False
    assert min(found.influence.values()) > 0.8


def test_the_taper_is_flat_falls_and_ends() -> None:
    scores = torch.tensor([-0.5, 0.0, 0.255, 0.4675, 0.68, 1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(taper(scores), torch.tensor([1, 1, 1, 0.5, 0, 0, 0], dtype=torch.float64))
    assert bool((taper(torch.linspace(-1, 3, 400)).diff() <= 0).all())


def test_copies_share_one_weight_and_those_left_out_crowd_nobody() -> None:
    similarity = torch.eye(5, dtype=torch.float64)
    similarity[:2, :2] = 1.0
    similarity[3, 4] = similarity[4, 3] = -0.9
    everyone = torch.ones(5, dtype=torch.bool)
    assert look_alikes(similarity, everyone).tolist() == [0.5, 0.5, 1, 1, 1]
    assert look_alikes(similarity, everyone.index_fill(0, torch.tensor([1]), False)).tolist() == [1.0] * 5
    assert look_alikes(torch.ones(5, 5), everyone).tolist() == [1.0] * 5


def test_norms_are_held_to_a_multiple_of_the_typical_one() -> None:
    energy = torch.tensor([1.0, 1.0, 4.0, 100.0, 0.0], dtype=torch.float64)
    counted = torch.tensor([True, True, True, False, True])
    found = clips(energy, counted, 1.5)
    assert found.tolist() == pytest.approx([1, 1, 0.75, 0.15, 1])
    assert clips(torch.zeros(3), torch.ones(3, dtype=torch.bool), 1.5).tolist() == [1.0] * 3


def test_the_mean_is_the_formula() -> None:
    updates = honest(0, K, 1.0)
    updates[2] = 2 * updates[2]
    found = Clair(refine="hard", exact=True, rank=2).fit(updates)
    norms = torch.stack([W.norm() for W in updates])
    clip = (1.5 * norms.median() / norms).clamp_max(1.0)
    mean = sum(found.shares[str(k)] * float(clip[k]) * W for k, W in enumerate(updates))
    torch.testing.assert_close(found.matrix(), mean)
    U = found.subspace["W"]
    torch.testing.assert_close(found.matrix("4"), U @ U.T @ updates[4] + mean - U @ U.T @ mean)
    assert found.influence["2"] < 0.8


def test_what_is_put_into_one_module_is_clipped_there() -> None:
    """A client of typical size as a whole, all of it in one of nine modules."""
    modules = {f"m{m}": honest(m, 8, 0.5) for m in range(9)}
    spent = sum(float(rows[0].norm()) ** 2 for rows in modules.values()) ** 0.5
    for name, rows in modules.items():
        rows[0] = spent * unit(rows[0]) if name == "m0" else 1e-3 * rows[0]
    found = Clair(refine="none").fit(modules)
    typical = float(torch.stack([W.norm() for W in modules["m0"]]).median())
    rest = sum(found.shares[str(k)] * modules["m0"][k] for k in range(1, 8))
    assert float((found.matrix(module="m0") - rest).norm()) <= 3.001 * typical * found.shares["0"]


def test_near_copies_do_not_hide_that_the_others_agree() -> None:
    """Four near-copies that live in a few input coordinates resemble each other with signs drawn by lot too. Over all
    clients that looks as if strangers agreed; over the core, from which they are absent, it does not."""
    g = torch.Generator().manual_seed(3)
    common = unit(normal(g, 96, 64))
    share = 0.12
    updates = [share**0.5 * common + (1 - share) ** 0.5 * unit(normal(g, 96, 64)) for _ in range(8)]
    narrow = unit(normal(g, 96, 1)) @ torch.eye(64, dtype=torch.float64)[:1]
    sent = updates + [unit(narrow + 0.05 * unit(normal(g, 96, 64))) for _ in range(4)]
    found = Clair(refine="none").fit(sent)
    assert found.diagnosis["direction_usable"] is True
    assert found.diagnosis["agreement_by_chance"] < 0.08
    assert found.flagged == ("8", "9", "10", "11")
    inner = torch.stack([(V * W).sum() for V in sent for W in sent]).reshape(K, K)
    signs = torch.randint(0, 2, (64,), generator=g) * 2.0 - 1
    drawn = [W * signs.roll(k) for k, W in enumerate(sent)]
    null = cosines(torch.stack([(V * W).sum() for V in drawn for W in drawn]).reshape(K, K))
    core = consensus(cosines(inner)).core
    assert chance_agreement(null) > float(found.diagnosis["agreement"]) > chance_agreement(null, core)


def test_order_of_named_clients_changes_no_bit() -> None:
    updates = honest(1)
    sent = updates + attack("min-max", updates, 1)
    ids, turn = [f"c{k:02d}" for k in range(K)], [7, 3, 11, 0, 1, 2, 10, 9, 8, 4, 5, 6]
    one = Clair().fit(sent, ids=ids)
    other = Clair().fit([sent[k] for k in turn], ids=[ids[k] for k in turn])
    assert one.influence == dict(sorted(other.influence.items()))
    assert one.shares == dict(sorted(other.shares.items()))
    assert torch.equal(one.matrix(), other.matrix())
    assert torch.equal(one.matrix("c01"), other.matrix("c01"))
    assert all(math.isfinite(value) for value in one.influence.values())
