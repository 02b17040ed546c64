"""Runs that stop by themselves: too many suspects, too much privacy spent."""
# SPDX-License-Identifier: Apache-2.0

import json
from pathlib import Path
from typing import Any

import models
import pytest

from fedlora_hf.commands.launch import exit_code
from fedlora_hf.errors import ConfigError, StoppedError
from fedlora_hf.privacy import epsilon
from fedlora_hf.util.counts import suspects_allowed

pytestmark = pytest.mark.usefixtures("bare_output")


@pytest.mark.parametrize(
    ("limit", "cohort", "allowed"),
    [(None, 8, None), ("0", 8, 0), (3, 8, 3), ("0.25", 8, 2), (0.29, 100, 29), ("0.3", 3, 0), ("0.0", 9, 0)],
)
def test_a_limit_is_a_number_or_a_share(limit: Any, cohort: int, allowed: int | None) -> None:
    assert suspects_allowed(limit, cohort) == allowed


@pytest.mark.parametrize("limit", ["-1", "1.5", "half", "nan", "1.0", "\n"])
def test_what_is_neither_is_refused(limit: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_suspects=.*: must be a whole number of clients"):
        models.federation(tmp_path, max_suspects=limit)


def broken(trainer: Any, client: str) -> None:
    """Make one client fail in every round."""
    train = trainer.train_client

    def failing(client_id: str, number: int) -> Any:
        if client_id == client and number > 1:
            raise ValueError("no data today")
        return train(client_id, number)

    trainer.train_client = failing


@pytest.mark.parametrize("limit", ["0", "0.3"])
def test_a_round_with_too_many_suspects_stops_and_changes_nothing(tmp_path: Path, limit: str) -> None:
    trainer = models.federation(tmp_path, aggregation="product_mean", num_rounds=3, max_suspects=limit)
    broken(trainer, "bob")
    with pytest.raises(StoppedError, match=r"round 2: 1 of 3 clients flagged or quarantined \(bob\), max_suspects="):
        trainer.train()
    assert trainer.store.committed() == [1]
    assert json.loads((tmp_path / "rounds" / "1" / "run.json").read_text())["quarantined"] == {}
    # With a higher limit the run goes on from there.
    again = models.federation(tmp_path, aggregation="product_mean", num_rounds=3, max_suspects="1", resume_from="last")
    broken(again, "bob")
    again.train()
    assert again.run.round == 3


def test_a_stopped_round_has_an_exit_code_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    def stopped() -> None:
        raise StoppedError("round 2: stopped")

    def refused() -> None:
        raise ConfigError("no")

    assert exit_code(stopped) == 3
    assert exit_code(refused) == 2
    assert capsys.readouterr().err == "fedlora: error: round 2: stopped\nfedlora: error: no\n"


def test_no_round_goes_past_the_epsilon_that_was_set(tmp_path: Path) -> None:
    limit = (epsilon(20.0, 2, 1e-5) + epsilon(20.0, 3, 1e-5)) / 2
    trainer = models.federation(
        tmp_path, aggregation="fedavg", num_rounds=4, dp_clip=1.0, dp_noise_multiplier=20.0, dp_max_epsilon=limit
    )
    with pytest.raises(StoppedError, match=r"round 3: a client that takes part in 3 rounds has epsilon .* dp_max_eps"):
        trainer.train()
    assert trainer.store.committed() == [1, 2]
    assert trainer.run.record.privacy["epsilon"] <= limit
    assert not (tmp_path / "rounds" / ".open-3" / "clients").exists()  # nobody was trained for it


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dp_max_epsilon": 0.0, "dp_clip": 1.0, "dp_noise_multiplier": 1.0}, "dp_max_epsilon=0.0"),
        ({"dp_max_epsilon": 8.0}, "dp_max_epsilon=8.0"),
        ({"dp_max_epsilon": 8.0, "dp_clip": 1.0}, "dp_max_epsilon=8.0"),
        ({"dp_max_epsilon": 8.0, "dp_clip": 1.0, "dp_noise_multiplier": 1.0, "dp_seed": 1}, "dp_seed=1"),
    ],
)
def test_a_budget_without_a_guarantee_is_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        models.federation(tmp_path, aggregation="fedavg", **options)
