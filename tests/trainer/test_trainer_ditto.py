"""Ditto-style personal steps: from the global adapter and held to it, by plain SGD written out."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from sample_updates import dense, same_bits

from fedlora_hf.errors import ConfigError
from fedlora_hf.update import AdapterState

pytestmark = pytest.mark.usefixtures("bare_output")
RATE, MU = 0.1, 3.0


def personal(folder: Path, steps: int, mu: float, own: AdapterState | None = None, **changes: Any) -> Any:
    """(the trainer, what client ada trains for itself from one global adapter)."""
    trainer = models.federation(
        folder, aggregation="fedavg", personal_steps=steps, personal_proximal_mu=mu, personal_learning_rate=RATE,
        optim="sgd", max_grad_norm=0.0, weight_decay=0.0, personalise="method", **changes,
    )  # fmt: skip
    state = AdapterState(dict(trainer.initial), trainer.initial.extras)
    return trainer, trainer.personal_adapter("ada", state, own, None)


def flat(state: AdapterState) -> torch.Tensor:
    return torch.cat([t.flatten().double() for f in state.values() for t in (f.A, f.B)])


def test_the_second_step_is_pulled_back_by_rate_times_mu_times_the_first(tmp_path: Path) -> None:
    trainer, one = personal(tmp_path / "1", 1, MU)
    _, free = personal(tmp_path / "2", 2, 0.0)
    _, held = personal(tmp_path / "3", 2, MU)
    pull = -RATE * MU * (flat(one.state) - flat(trainer.initial))
    torch.testing.assert_close(flat(held.state) - flat(free.state), pull, atol=1e-7, rtol=1e-3)


def test_it_starts_from_the_global_adapter_whatever_was_chosen(tmp_path: Path) -> None:
    _, without = personal(tmp_path / "1", 3, MU)
    other = models.federation(tmp_path / "x", aggregation="fedavg").initial
    strange = AdapterState({m: f * 5 for m, f in other.items()}, other.extras)
    _, beside = personal(tmp_path / "2", 3, MU, own=strange)
    assert same_bits(without.state, beside.state)
    assert str(beside.choice) == "global, tuned"


def test_the_stronger_the_nearer(tmp_path: Path) -> None:
    lengths = []
    for mu in (0.0, 2.0, 6.0):
        trainer, found = personal(tmp_path / str(mu), 6, mu)
        lengths.append(float((flat(found.state) - flat(trainer.initial)).norm()))
    assert lengths[0] > lengths[1] > lengths[2] > 0


def test_a_run_offers_it_and_keeps_it_only_where_it_is_better(tmp_path: Path) -> None:
    trainer = models.federation(
        tmp_path, models.token_clients({"ada": 6, "bob": 6}, held_out=2), aggregation="fedavg", personal_steps=2,
        personal_proximal_mu=0.1, num_rounds=1,
    )  # fmt: skip
    trainer.train()
    for facts in trainer.run.record.clients.values():
        losses = facts["personal"]["validation_loss"]
        assert "global, tuned" in losses
        assert losses[facts["personal"]["choice"]] == min(losses.values())
    assert all(bool(torch.isfinite(dense(state)).all()) for state in trainer.run.personalised.values())


def test_without_steps_it_has_no_effect_and_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"personal_proximal_mu=0\.5: has no effect without personal_steps"):
        models.federation(tmp_path, aggregation="fedavg", personal_proximal_mu=0.5)
