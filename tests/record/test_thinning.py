"""The record of a long run stays bounded, and says as much of the present as ever."""
# SPDX-License-Identifier: Apache-2.0

import copy
import json
from pathlib import Path
from typing import Any

import models
import pytest

from fedlora_hf.record import thinning
from fedlora_hf.record.record import RunRecord, check_complete
from fedlora_hf.record.standing import last_rounds
from fedlora_hf.record.thinning import thin, thinned_modules


def entry(number: int, clients: int = 3) -> dict[str, Any]:
    ids = [f"c{n}" for n in range(clients)]
    evidence = {client: {"subspace": {"score": 0.1, "threshold": 0.5}} for client in ids}
    return {
        "round": number,
        "cohort": ids,
        "collaborative": ids,
        "flagged": [],
        "quarantined": {},
        "weights": dict.fromkeys(ids, 1 / clients),
        "train_loss": dict.fromkeys(ids, 1.0),
        "update_norm": dict.fromkeys(ids, 1.0),
        "evidence": evidence,
        "combined_evidence": copy.deepcopy(evidence),
        "bytes_up": dict.fromkeys(ids, 100),
        "seconds": {"train": 1.0},
        "metrics": {},
    }


def test_rounds_beyond_the_limit_lose_their_details_and_the_last_never_does() -> None:
    rounds = [entry(n) for n in range(1, 6)]
    before = copy.deepcopy(rounds)
    thin(rounds, turns=6)
    assert [item.get("thinned", False) for item in rounds] == [True, True, True, False, False]
    assert rounds[3:] == before[3:]
    assert (rounds[0]["evidence"], rounds[0]["weights"], rounds[0]["collaborative"]) == ({}, {}, [])
    for kept in ("cohort", "flagged", "quarantined", "train_loss", "bytes_up"):
        assert rounds[0][kept] == before[0][kept]
    thin(rounds, turns=0)
    assert [item.get("thinned", False) for item in rounds] == [True] * 4 + [False]


def test_round_by_round_is_the_same_as_at_once() -> None:
    at_once, one_by_one = [entry(n) for n in range(1, 9)], []
    for item in copy.deepcopy(at_once):
        one_by_one.append(item)
        thin(one_by_one, turns=7)
    thin(at_once, turns=7)
    assert one_by_one == at_once


def test_runs_of_usual_size_are_told_in_full() -> None:
    rounds = [entry(n, clients=50) for n in range(1, 201)]
    thin(rounds)
    assert not any("thinned" in item for item in rounds)


def test_modules_of_many_clients_lose_their_evidence() -> None:
    modules = {f"m{n}": {"rank": 2, "evidence": {"c0": {"scale": 1.0}}} for n in range(10)}
    assert thinned_modules(modules, 100) == modules
    assert thinned_modules(modules, 3000) == {name: {"rank": 2} for name in modules}


@pytest.mark.usefixtures("bare_output")
@pytest.mark.filterwarnings("ignore::fedlora_hf.errors.ConvergenceWarning")
@pytest.mark.parametrize("method", ["clair", "fedsa"])
def test_a_thinned_run_is_gone_on_from_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(thinning.thin, "__defaults__", (6,))
    clients = models.token_clients({"ada": 4, "bob": 6, "eve": 5}, held_out=2)
    options: dict[str, Any] = {"aggregation": method, "local_steps": 1}
    models.federation(tmp_path / "whole", clients, num_rounds=6, **options).train()
    models.federation(tmp_path / "parts", clients, num_rounds=4, **options).train()
    models.federation(tmp_path / "parts", clients, num_rounds=6, **options, resume_from="last").train()
    assert models.weight_files(tmp_path / "parts") == models.weight_files(tmp_path / "whole")
    record = RunRecord.load(tmp_path / "parts")
    assert [item.get("thinned", False) for item in record.rounds] == [True] * 4 + [False] * 2
    check_complete(record, 6, "here")
    assert last_rounds(record) == dict.fromkeys(clients, 6)
    assert all(facts["weight"] > 0 for facts in record.clients.values())


@pytest.mark.usefixtures("bare_output")
def test_a_client_seen_long_ago_keeps_its_standing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its round has been thinned; its weight and evidence stand as they were found then."""
    monkeypatch.setattr(thinning.thin, "__defaults__", (1,))
    clients = models.token_clients({"ada": 4, "bob": 6, "eve": 5})
    trainer = models.federation(tmp_path, clients, num_rounds=6, clients_per_round=1, local_steps=1)
    trainer.train()
    record = json.loads((tmp_path / "run.json").read_text())
    last = record["rounds"][-1]["cohort"]
    seen = {client for item in record["rounds"] for client in item["cohort"]}
    assert seen - set(last)
    assert all(record["clients"][client]["weight"] == 1.0 for client in seen)
