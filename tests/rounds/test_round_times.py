"""A round's wall time by part: in the record, adding up, and not in what two runs of one seed differ by."""
# SPDX-License-Identifier: Apache-2.0

import time
from pathlib import Path
from typing import Any

import models
import pytest

from fedlora_hf.record.record import RunRecord
from fedlora_hf.util.stopwatch import PARTS


def slower(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, seconds: float) -> None:
    """Let a method take so much longer."""
    method = getattr(place, name)

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return method(*args, **kwargs)

    monkeypatch.setattr(place, name, slow)


def test_the_parts_of_a_round_are_recorded_and_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = models.token_clients({"ada": 4, "bob": 6, "eve": 5}, held_out=3)
    trainer = models.federation(
        tmp_path / "run", clients, eval_strategy="epoch", aggregation="clair", functional_judges=1
    )
    slower(monkeypatch, trainer.store, "commit", 0.2)
    slower(monkeypatch, trainer.loop.transport, "judge", 0.3)
    slower(monkeypatch, trainer.watcher, "round_begins", 0.1)
    began = time.perf_counter()
    trainer.train()
    whole = time.perf_counter() - began
    rounds = RunRecord.load(tmp_path / "run").rounds
    assert [entry["seconds"] for entry in rounds] == [entry["seconds"] for entry in trainer.run.record.rounds]
    for entry in rounds:
        found = entry["seconds"]
        assert set(found) == set(PARTS)
        assert all(seconds > 0 for seconds in found.values())
        assert found["write"] >= 0.2
        assert found["judge"] >= 0.3
        assert found["idle"] >= 0.1
    assert sum(sum(entry["seconds"].values()) for entry in rounds) <= whole
