"""Personal adapters: mixes are exact, the smallest validation loss wins, and what a client keeps stays its own."""
# SPDX-License-Identifier: Apache-2.0

import math
from pathlib import Path
from typing import Any

import models
import pytest
import sample_updates
import torch

from fedlora_hf.errors import UpdateError
from fedlora_hf.training.personal import MIXES, Choice, Personal, Source, best, candidates, given, mix, with_kept
from fedlora_hf.update import AdapterState

ADA, BOB, EVE = (client.state for client in sample_updates.cohort(3))


def test_a_mix_is_the_sum_of_its_shares_up_to_the_rank() -> None:
    mixed = mix(ADA, BOB, 0.25, rank=8)
    expected = 0.75 * sample_updates.dense(ADA) + 0.25 * sample_updates.dense(BOB)
    assert sample_updates.relative(sample_updates.dense(mixed), expected) < 1e-6
    torch.testing.assert_close(
        mixed.extras["score.weight"], 0.75 * ADA.extras["score.weight"] + 0.25 * BOB.extras["score.weight"]
    )
    small = mix(ADA, BOB, 0.25, rank=4)
    assert {factors.rank for factors in small.values()} == {4}
    for module in small:
        W = 0.75 * ADA[module].dense(torch.float64) + 0.25 * BOB[module].dense(torch.float64)
        U, S, V = torch.linalg.svd(W, full_matrices=False)
        assert sample_updates.relative(small[module].dense(torch.float64), U[:, :4] * S[:4] @ V[:4]) < 1e-5


def test_candidates_are_offered_from_the_most_refined() -> None:
    names = [str(choice) for choice, _ in candidates(ADA, BOB, EVE, 4)]
    assert names == ["refined", "global", "own", "mix-0.25", "mix-0.5", "mix-0.75"]
    assert [choice for choice, _ in candidates(ADA, None, None, 4)] == [Choice(Source.GLOBAL)]
    assert _plain(given(ADA, BOB, EVE)) == ("refined", EVE)
    assert _plain(given(ADA, BOB, None)) == ("own", BOB)
    assert _plain(given(ADA, None, None)) == ("global", ADA)


def _plain(found: Personal) -> tuple[str, AdapterState]:
    assert found.losses == {}
    return str(found.choice), found.state


def test_a_choice_is_a_text_and_back() -> None:
    for source in Source:
        for share in MIXES if source is Source.MIX else (0.0,):
            for tuned in (False, True):
                choice = Choice(source, share, tuned)
                assert Choice.parse(str(choice)) == choice
    assert str(Choice(Source.MIX, 0.25, tuned=True)) == "mix-0.25, tuned"
    for text in ("", "mix", "mix-0.3", "own,tuned", "x" * 1000):
        with pytest.raises(UpdateError, match=r"must be one of refined, global, own, mix-0\.25"):
            Choice.parse(text)


def test_what_is_stored_for_a_choice() -> None:
    sizes = {"global": 0, "global, tuned": 3, "own": 10, "own, tuned": 10, "mix-0.5": 10, "refined": 10}
    for text, size in sizes.items():
        assert Choice.parse(text).bytes_stored(part_bytes=3, whole_bytes=10) == size


@pytest.mark.parametrize(
    ("losses", "winner"),
    [([3.0, 2.0, 4.0], "two"), ([2.0, 2.0, 2.0], "one"), ([math.nan, 5.0, math.nan], "two"), ([math.nan] * 3, None)],
)
def test_the_smallest_loss_wins(losses: list[float], winner: str | None) -> None:
    choices = {"one": Choice(Source.REFINED), "two": Choice(Source.GLOBAL), "three": Choice(Source.OWN)}
    offered = dict(zip(choices.values(), (ADA, BOB, EVE), strict=True))
    of = {id(state): loss for state, loss in zip(offered.values(), losses, strict=True)}
    found = best(iter(offered.items()), lambda state: of[id(state)])
    assert list(found.losses) == list(offered)
    assert found.state is offered[found.choice]
    assert winner is None or found.choice == choices[winner]


def test_what_a_client_keeps_is_put_back() -> None:
    halved = AdapterState({module: factors.rescaled(4.0) for module, factors in BOB.items()}, BOB.extras)
    both = with_kept(ADA, halved, ("B",))
    for module in both:
        assert torch.equal(both[module].A, ADA[module].A)
        assert torch.equal(both[module].B, BOB[module].B)
        assert both[module].scale == ADA[module].scale
    assert sample_updates.same_bits(with_kept(ADA, BOB, ()), ADA)
    whole = with_kept(ADA, BOB, ("A", "B"))
    assert sample_updates.same_bits(AdapterState(dict(whole), {}), AdapterState(dict(BOB), {}))
    assert torch.equal(whole.extras["score.weight"], ADA.extras["score.weight"])


def personal(folder: Path, **changes: Any) -> Any:
    clients = models.token_clients({"ada": 6, "bob": 6, "eve": 6}, held_out=4)
    trainer = models.federation(folder, clients, **changes)
    trainer.train()
    return trainer


def test_a_personal_adapter_is_the_best_offered_on_the_validation_split(tmp_path: Path, bare_output: None) -> None:
    trainer = personal(tmp_path, num_rounds=2, local_steps=6)
    for client, state in trainer.run.personalised.items():
        facts = trainer.run.record.clients[client]["personal"]
        losses = facts["validation_loss"]
        assert facts["choice"] == min(losses, key=losses.get)
        assert set(losses) == {"global", "own", "mix-0.25", "mix-0.5", "mix-0.75"}
        found = trainer.scorer.metrics(state, trainer.clients[client].validation)["loss"]
        assert found == pytest.approx(min(losses.values()), rel=1e-5)
    means = trainer.run.record.metrics["after"]
    assert means["personalised"]["loss"] < means["global"]["loss"]


def test_without_choosing_a_client_has_its_own_update(tmp_path: Path, bare_output: None) -> None:
    trainer = personal(tmp_path, personalise="method")
    for client, state in trainer.run.personalised.items():
        facts = trainer.run.record.clients[client]["personal"]
        assert set(facts) == {"choice", "validation_loss", "parts", "changed", "bytes_stored"}
        assert (facts["choice"], facts["validation_loss"], facts["parts"]) == ("own", {}, [])
        own = trainer.federation.last_update(trainer.run.record, client)
        assert sample_updates.same_bits(state.in_memory(), own.state.in_memory())


def test_further_steps_are_kept_only_where_they_help(tmp_path: Path, bare_output: None) -> None:
    helped = personal(tmp_path / "helped", personal_steps=6)
    hurt = personal(tmp_path / "hurt", personal_steps=6, learning_rate=3.0)
    for trainer in (helped, hurt):
        for facts in trainer.run.record.clients.values():
            losses = facts["personal"]["validation_loss"]
            assert facts["personal"]["choice"] == min(losses, key=losses.get)
            assert any(name.endswith(", tuned") for name in losses)
    assert all(f["personal"]["choice"].endswith(", tuned") for f in helped.run.record.clients.values())
