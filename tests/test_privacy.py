"""Clipping, noise and its account: against the definition, against another accountant, and in whole runs."""
# SPDX-License-Identifier: Apache-2.0

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import dp_accounting
import models
import pytest
import torch
from dp_accounting import pld
from sample_updates import cohort, same_bits

from fedlora_hf.errors import ConfigError, UpdateError
from fedlora_hf.hub import render_card
from fedlora_hf.hub.tables import privacy_told
from fedlora_hf.privacy import Privacy, account, epsilon
from fedlora_hf.record.record import RunRecord
from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors

SECRET = b"s" * 32


def vector(state: AdapterState, start: AdapterState, untrained: tuple[str, ...] = ()) -> torch.Tensor:
    """The change since the start, in factor space, as one vector."""
    parts = []
    for module, after in state.items():
        before = start[module].rescaled(after.scale).padded(after.rank)
        parts += [getattr(after, f) - getattr(before, f) for f in "AB" if f not in untrained]
    parts += [state.extras[name] - start.extras[name] for name in sorted(state.extras)]
    return torch.cat([part.double().flatten() for part in parts])


def privacy(clip: float, multiplier: float, secret: bytes = SECRET) -> Privacy:
    return Privacy(clip, multiplier, 1e-5, secret)


@pytest.fixture
def pair() -> tuple[ClientUpdate, AdapterState]:
    """An update with a head, and the state it started from."""
    update, start = cohort(2)
    return replace(update, metrics={"train_loss": 0.5, "steps": 3}), start.state


def test_without_noise_a_long_change_is_scaled_to_the_clip_and_a_short_one_left(
    pair: tuple[ClientUpdate, AdapterState],
) -> None:
    update, start = pair
    change = vector(update.state, start)
    found = vector(privacy(0.5, 0).applied(update, start, (), "x").state, start)
    assert float(found.norm()) == pytest.approx(0.5, rel=1e-5)
    assert torch.allclose(found, change * (0.5 / change.norm()), atol=1e-6)
    left = privacy(2 * float(change.norm()), 0).applied(update, start, (), "x").state
    assert torch.allclose(vector(left, start), change, atol=1e-6)


def test_the_noise_has_its_variance_and_no_pattern(pair: tuple[ClientUpdate, AdapterState]) -> None:
    update, start = pair
    quiet = vector(privacy(0.5, 0).applied(update, start, (), "x").state, start)
    draws = [vector(privacy(0.5, 3).applied(update, start, (), n).state, start) - quiet for n in range(40)]
    noise = torch.stack(draws)
    assert float(noise.std()) == pytest.approx(1.5, rel=0.02)
    assert abs(float(noise.mean())) < 1.5 * 4 / math.sqrt(noise.numel())
    correlation = torch.corrcoef(noise)
    off = correlation[~torch.eye(len(draws), dtype=torch.bool)]
    assert float(off.abs().max()) < 5.5 / math.sqrt(noise.shape[1])


def test_the_noise_is_normal() -> None:
    x = privacy(1, 1).noise(torch.Size((400, 500)), "any").flatten()
    share = torch.special.ndtr(x)
    # Kolmogorov-Smirnov at a level of one in ten thousand.
    distance = (share.sort().values - (torch.arange(len(x)) + 0.5) / len(x)).abs().max()
    assert float(distance) < 2.23 / math.sqrt(len(x))
    assert float(x.abs().max()) < 6


def test_noise_depends_on_secret_and_path_alone(pair: tuple[ClientUpdate, AdapterState]) -> None:
    update, start = pair
    first = privacy(1, 1).applied(update, start, (), "a").state
    assert same_bits(first, privacy(1, 1).applied(update, start, (), "a").state)
    assert not same_bits(first, privacy(1, 1).applied(update, start, (), "b").state)
    assert not same_bits(first, privacy(1, 1, b"t" * 32).applied(update, start, (), "a").state)
    assert not same_bits(first, Privacy(1, 1, 1e-5).applied(update, start, (), "a").state)
    assert Privacy(1, 1, 1e-5).secret != Privacy(1, 1, 1e-5).secret
    assert "secret" not in repr(privacy(1, 1))


@pytest.mark.parametrize("untrained", [("A",), ("B",)])
def test_a_factor_that_was_not_trained_gets_no_noise(
    pair: tuple[ClientUpdate, AdapterState], untrained: tuple[str]
) -> None:
    update, start = pair
    found = privacy(0.1, 5).applied(update, start, untrained, "x").state
    for module, factors in found.items():
        kept, sent = getattr(factors, untrained[0]), getattr(factors, "B" if untrained == ("A",) else "A")
        assert torch.equal(kept, getattr(update.state[module], untrained[0]))
        assert not torch.equal(sent, getattr(update.state[module], "B" if untrained == ("A",) else "A"))
    quiet = vector(privacy(0.1, 0).applied(update, start, untrained, "x").state, start, untrained)
    assert float(quiet.norm()) == pytest.approx(0.1, rel=1e-4)


def test_a_start_of_lower_rank_and_another_scale_is_the_same_start(pair: tuple[ClientUpdate, AdapterState]) -> None:
    update, _ = pair
    low = {m: LoraFactors(f.A[:1], f.B[:, :1] * 2, f.scale / 2) for m, f in update.state.items()}
    start = AdapterState(low, update.state.extras)
    change = vector(update.state, start)
    found = vector(privacy(0.2, 0).applied(update, start, (), "x").state, start)
    assert torch.allclose(found, change * (0.2 / change.norm()), atol=1e-6)


def test_the_loss_of_the_training_does_not_leave(pair: tuple[ClientUpdate, AdapterState]) -> None:
    assert dict(privacy(1, 1).applied(*pair, (), "x").metrics) == {"steps": 3}


@pytest.mark.parametrize(("multiplier", "rounds"), [(4.0, 1), (10.0, 3), (30.0, 50)])
def test_epsilon_is_that_of_another_accountant(multiplier: float, rounds: int) -> None:
    """Privacy loss distributions, composed numerically: of the mechanism with sensitivity 2 * clip."""
    accountant = pld.PLDAccountant()
    event = dp_accounting.GaussianDpEvent(multiplier / 2)
    accountant.compose(dp_accounting.SelfComposedDpEvent(event, rounds))
    assert epsilon(multiplier, rounds, 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)


def test_epsilon_at_its_ends() -> None:
    assert epsilon(1, 0, 1e-5) == 0
    assert epsilon(0, 1, 1e-5) == math.inf
    assert epsilon(1, 2, 1e-5) > epsilon(1, 1, 1e-5) > epsilon(2, 1, 1e-5) > epsilon(2, 1, 1e-2)


OPTIONS = {"dp_clip": 0.5, "dp_noise_multiplier": 8.0}
ROUNDS = [{"cohort": ["ada", "bob"]}, {"cohort": ["bob", "eve"]}, {"cohort": ["bob"]}]


def test_the_account_is_that_of_whoever_took_part_most() -> None:
    found = account(OPTIONS, ROUNDS)
    assert (found["rounds"], found["epsilon"], found["delta"]) == (3, epsilon(8, 3, 1e-5), 1e-5)
    assert privacy_told(found) == f"epsilon {epsilon(8, 3, 1e-5):.3g} at delta 1e-05, for a client in 3 rounds"
    assert account({}, ROUNDS) == {}
    assert privacy_told({}) == ""


@pytest.mark.parametrize(("changes", "why"), [({"dp_noise_multiplier": 0.0}, "no noise"), ({"dp_seed": 1}, "dp_seed")])
def test_where_nothing_is_guaranteed_no_epsilon_is_told(changes: dict[str, Any], why: str) -> None:
    found = account({**OPTIONS, **changes}, ROUNDS)
    assert found["epsilon"] is None
    assert why in found["note"]
    assert privacy_told(found).startswith("no guarantee: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dp_noise_multiplier": 1.0}, "dp_noise_multiplier=1.0: has no effect without dp_clip; pass --dp_clip"),
        ({"dp_seed": 0}, "dp_seed=0: has no effect without dp_clip"),
        ({"dp_clip": 1.0, "dp_delta": 0.1}, "dp_delta=0.1: has no effect without dp_noise_multiplier"),
        ({"dp_clip": 0.0}, "dp_clip=0.0"),
        ({"dp_clip": float("inf")}, "dp_clip=inf"),
        ({"dp_clip": 1.0, "dp_noise_multiplier": -1.0}, "dp_noise_multiplier=-1.0"),
        ({"dp_clip": 1.0, "dp_noise_multiplier": float("nan")}, "dp_noise_multiplier=nan"),
        ({"dp_clip": 1.0, "dp_delta": 1.0}, "dp_delta=1.0"),
        ({"dp_clip": 1.0, "functional_judges": 2, "aggregation": "clair"}, "functional_judges=2"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        models.federation(tmp_path, **changes)


def run(folder: Path, **changes: Any) -> RunRecord:
    trainer = models.federation(folder, models.token_clients({"ada": 4, "bob": 6, "eve": 5}, held_out=2), **changes)
    trainer.train()
    return RunRecord.load(folder)


@pytest.mark.usefixtures("bare_output")
def test_a_run_with_noise_tells_epsilon_everywhere_and_is_never_the_same_twice(tmp_path: Path, capsys: Any) -> None:
    options = {"dp_clip": 0.1, "dp_noise_multiplier": 4.0}
    record = run(tmp_path / "one", **options)
    assert record.privacy["epsilon"] == pytest.approx(epsilon(4, 2, 1e-5))
    assert record.privacy["rounds"] == 2
    assert all(entry["train_loss"] == {} for entry in record.rounds)
    line = f"epsilon {record.privacy['epsilon']:.3g} at delta 1e-05, for a client in 2 rounds"
    card = (tmp_path / "one" / "README.md").read_text()
    assert line in card
    assert "No formal guarantee" not in card
    assert "one client's training examples replaced by any others, as many" in card
    run(tmp_path / "two", **options)
    assert models.weight_files(tmp_path / "one") != models.weight_files(tmp_path / "two")


@pytest.mark.usefixtures("bare_output")
def test_a_seed_makes_runs_the_same_resumed_or_not_and_voids_the_guarantee(tmp_path: Path) -> None:
    options = {"dp_clip": 0.1, "dp_noise_multiplier": 1.0, "dp_seed": 3}
    record = run(tmp_path / "one", **options)
    run(tmp_path / "two", **options, num_rounds=1)
    run(tmp_path / "two", **options, resume_from="last")
    assert models.weight_files(tmp_path / "one") == models.weight_files(tmp_path / "two")
    assert record.privacy["epsilon"] is None
    assert "no guarantee" in (tmp_path / "one" / "README.md").read_text()
    with pytest.raises(ConfigError, match=r"dp_noise_multiplier=2\.0: the run to resume has 1\.0"):
        run(tmp_path / "two", **{**options, "dp_noise_multiplier": 2.0}, resume_from="last")


@pytest.mark.usefixtures("bare_output")
@pytest.mark.parametrize("method", ["ffa", "fedsa", "stacking", "dirmag_mean"])
def test_every_way_of_starting_a_round_is_clipped_from_its_own_start(tmp_path: Path, method: str) -> None:
    """With a clip of nearly nothing and no noise, nobody can move: the adapter is where it began."""
    more = {"adapter": "dirmag"} if method == "dirmag_mean" else {}
    trainer = models.federation(tmp_path, aggregation=method, dp_clip=1e-7, **more)
    trainer.train()
    assert trainer.run.state.norm() < 1e-4
    free = models.federation(tmp_path / "free", aggregation=method, **more)
    free.train()
    assert free.run.state.norm() > 1e-2


@pytest.mark.usefixtures("bare_output")
def test_a_run_without_privacy_says_nothing_of_it(tmp_path: Path) -> None:
    record = run(tmp_path)
    assert record.privacy == {}
    assert not [name for name in record.options if name.startswith("dp_")]
    assert "No formal guarantee" in (tmp_path / "README.md").read_text()


def test_a_record_from_elsewhere_cannot_claim_in_markup() -> None:
    nasty = {"epsilon": 1.0, "delta": 1e-5, "rounds": "<script>", "neighbours": "[x](http://e)", "adversary": ["a"]}
    record = RunRecord.from_dict(json.loads(RunRecord(kind="train", method="m", seed=0, privacy=nasty).to_json()))
    card = render_card(record)
    assert "<script>" not in card
    assert "](http:" not in card


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["A", "head"])
def test_a_change_without_a_norm_is_not_sent(bad: float, where: str, pair: tuple[ClientUpdate, AdapterState]) -> None:
    update, start = pair
    extras = {name: tensor.clone() for name, tensor in update.state.extras.items()}
    state = {m: LoraFactors(f.A.clone(), f.B, f.scale) for m, f in update.state.items()}
    (next(iter(extras.values())) if where == "head" else next(iter(state.values())).A)[0, 0] = bad
    with pytest.raises(UpdateError, match="nothing is sent"):
        privacy(1.0, 0.1).applied(replace(update, state=AdapterState(state, extras)), start, (), "x")


def test_no_draw_gives_infinite_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ones:
        def digest(self, count: int) -> bytes:
            return (b"\xff" * 7 + b"\x7f") * (count // 8)  # the largest number there is

    monkeypatch.setattr("fedlora_hf.privacy.hashlib.shake_256", lambda key: Ones())
    noise = privacy(1.0, 1.0).noise(torch.Size([3]), "x")
    assert bool(noise.isfinite().all())
    assert float(noise[0]) == pytest.approx(8.2, abs=0.2)
