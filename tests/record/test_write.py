"""What a round leaves in the record, and the standing of clients that follows from it."""
# SPDX-License-Identifier: Apache-2.0

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import sample_updates
import torch

from fedlora_hf.aggregation import aggregate
from fedlora_hf.errors import ConfigError
from fedlora_hf.numerics.evidence import Evidence
from fedlora_hf.record.changes import compared, component_changes
from fedlora_hf.record.lines import claims_line, round_line, round_log
from fedlora_hf.record.record import RunRecord
from fedlora_hf.record.standing import collaborative, last_rounds, needed_updates, update_standing
from fedlora_hf.record.write import add_round, check_same_run, newcomer
from fedlora_hf.update import AdapterState, Aggregate, LoraFactors

IDS = ["ada", "bob", "eve", "kim"]


def blank(rounds: list[dict[str, Any]] | None = None) -> RunRecord:
    clients = {
        client: {"collaborative": True, "weight": 0.0, "num_examples": 1, "evidence": {}, "metrics": {}}
        for client in IDS
    }
    return RunRecord(kind="train", method="clair", seed=0, clients=clients, rounds=rounds or [])


def entry(number: int, cohort: str, flagged: str = "", quarantined: str = "") -> dict[str, Any]:
    reasons = dict.fromkeys(quarantined.split(), "NaN")
    good = [client for client in cohort.split() if client not in flagged.split() and client not in reasons]
    evidence = {client: {"scale": {"score": number, "threshold": 3.0}} for client in cohort.split()}
    return {
        "round": number,
        "cohort": cohort.split(),
        "flagged": flagged.split(),
        "quarantined": reasons,
        "weights": {client: 1 / len(good) for client in good},
        "evidence": evidence,
        "combined_evidence": evidence,
    }


def test_a_client_stands_as_its_last_round_left_it() -> None:
    record = blank(
        [
            entry(1, "ada bob eve", flagged="bob", quarantined="eve"),
            entry(2, "ada kim", flagged="ada"),
            entry(3, "eve kim"),
        ]
    )
    update_standing(record)
    assert record.flagged == ["ada", "bob"]
    assert record.quarantined == {}
    assert collaborative(record) == ["eve", "kim"]
    assert {client: facts["weight"] for client, facts in record.clients.items()} == {
        "ada": 0.0,
        "bob": 0.0,
        "eve": 0.5,
        "kim": 0.5,
    }
    assert record.clients["bob"]["evidence"]["scale"]["score"] == 1
    record.rounds.append(entry(4, "kim bob", quarantined="kim"))
    update_standing(record)
    assert record.flagged == ["ada"]
    assert record.quarantined == {"kim": "NaN"}


def test_last_rounds_are_those_with_a_usable_update() -> None:
    rounds = [entry(1, "ada bob"), entry(2, "bob eve", quarantined="bob"), entry(3, "eve")]
    assert last_rounds(blank(rounds)) == {"ada": 1, "bob": 1, "eve": 3}
    assert needed_updates(blank(rounds), 1) == {(1, "ada"), (1, "bob"), (3, "eve")}
    assert needed_updates(blank(rounds), 2) == {(1, "ada"), (1, "bob"), (2, "eve"), (3, "eve")}
    assert needed_updates(blank([]), 2) == set()


def test_a_round_is_written_down() -> None:
    updates = sample_updates.cohort(3)
    combined = aggregate(updates, "product_mean")
    record = blank()
    record.clients = {u.client_id: {"num_examples": u.num_examples} for u in updates} | {"client9": {}}
    cohort = ["client0", "client1", "client2", "client9"]
    seconds = {"train": 2.0, "aggregate": 1.0}
    add_round(record, 1, cohort, updates, combined, {"client9": "NaN"}, updates[0].state, seconds)
    (written,) = record.rounds
    assert written["weights"] == pytest.approx({"client0": 1 / 6, "client1": 2 / 6, "client2": 3 / 6})
    assert written["update_norm"]["client0"] == pytest.approx(0, abs=1e-5)
    difference = sample_updates.dense(updates[1].state) - sample_updates.dense(updates[0].state)
    assert written["update_norm"]["client1"] == pytest.approx(float(difference.norm()))
    # Two modules of rank 4 and a head of 18 numbers, in float32.
    size = 4 * (4 * (24 + 20) + 4 * (12 + 20) + 18)
    assert written["bytes_up"] == dict.fromkeys(["client0", "client1", "client2"], size)
    assert written["bytes_down"] == dict.fromkeys(cohort, size)
    assert record.quarantined == {"client9": "NaN"}
    assert set(record.modules) == set(sample_updates.SHAPES)
    assert round_log(written) == {"round": 1, "flagged": 0, "quarantined": 1, "seconds": 3.0}
    assert round_line(written, 3) == "round 1/3: 4 clients, quarantined client9, 3.0 s"
    assert RunRecord.from_dict({**_json(record)}).rounds == _json(record)["rounds"]


def _json(record: RunRecord) -> dict[str, Any]:
    return dict(json.loads(record.to_json()))


@pytest.mark.parametrize("size", [0, 100])
def test_bytes_are_those_of_the_message(size: int) -> None:
    """0 for a method that shares nothing."""
    updates, record = sample_updates.cohort(2), blank()
    record.clients = {u.client_id: {} for u in updates}
    combined = aggregate(updates, "product_mean")
    ids = [u.client_id for u in updates]
    add_round(record, 1, ids, updates, combined, {}, updates[0].state, {}, message_bytes=size)
    assert record.rounds[0]["bytes_up"] == record.rounds[0]["bytes_down"] == dict.fromkeys(ids, size)


def test_how_far_directions_and_magnitudes_moved() -> None:
    start = sample_updates.cohort(1)[0].state
    doubled = AdapterState({m: LoraFactors(f.A * 2, -f.B, f.scale) for m, f in start.items()})
    moved = component_changes(start, doubled)
    assert moved["A.direction"] == pytest.approx(0, abs=1e-6)
    assert moved["A.magnitude"] > 1
    assert moved["B.direction"] == pytest.approx(2)
    assert moved["B.magnitude"] == pytest.approx(0, abs=1e-6)
    assert component_changes(start, AdapterState({m: f.padded(6) for m, f in start.items()})) == {}


def test_norms_and_cosines_are_of_the_changes_of_all_modules_together() -> None:
    updates = sample_updates.cohort(4)
    start = updates[3].state
    norms, found = compared(updates[:3], start, list(start))
    changes = torch.stack([sample_updates.dense(u.state) - sample_updates.dense(start) for u in updates[:3]])
    assert list(norms) == ["client0", "client1", "client2"]
    assert list(norms.values()) == pytest.approx(changes.norm(dim=1).tolist())
    changes /= changes.norm(dim=1, keepdim=True)
    assert found["ids"] == ["client0", "client1", "client2"]
    torch.testing.assert_close(torch.tensor(found["cosine"]).double(), changes @ changes.T, atol=1e-4, rtol=0)
    alone, none = compared(updates[:1], start, list(start))
    assert (alone, none) == ({"client0": pytest.approx(norms["client0"])}, {})


def test_evidence_is_plain_numbers() -> None:
    updates = sample_updates.cohort(2)
    evidence = {"client0": {"scale": Evidence(4.0, 3.0), "subspace": Evidence(0.1, None)}}
    combined = Aggregate(updates[0].state, weights={"client1": 1.0}, flagged=("client0",), evidence=evidence)
    record = blank()
    record.clients = {u.client_id: {} for u in updates}
    add_round(record, 1, ["client0", "client1"], updates, combined, {}, None, {})
    assert record.rounds[0]["evidence"]["client0"] == {
        "scale": {"score": 4.0, "threshold": 3.0},
        "subspace": {"score": 0.1, "threshold": None},
    }
    assert record.rounds[0]["bytes_down"] == {}
    assert record.flagged == ["client0"]
    assert record.rounds[0]["collaborative"] == ["client1"]


def test_influence_and_suspicion_follow_the_last_round_of_each_client() -> None:
    updates = sample_updates.cohort(2)
    record = blank()
    record.clients = {u.client_id: {} for u in updates}
    for number, (kept, near) in enumerate([(0.2, {"client0": ("direction", 0.7)}), (0.9, {})], 1):
        influence = {"client0": kept, "client1": 1.0}
        combined = Aggregate(updates[0].state, weights={"client1": 1.0}, influence=influence, suspicious=near)
        add_round(record, number, ["client0", "client1"], updates, combined, {}, None, {})
        assert record.clients["client0"]["influence"] == record.rounds[-1]["influence"]["client0"] == kept
        assert record.suspicious == ({"client0": {"kind": "direction", "of_line": 0.7}} if near else {})
    assert record.rounds[0]["suspicious"] == {"client0": {"kind": "direction", "of_line": 0.7}}
    plain = Aggregate(updates[0].state, weights={"client1": 1.0})
    add_round(record, 3, ["client1"], updates[1:], plain, {}, None, {})
    assert record.clients["client0"]["influence"] == 0.9


def test_run_json_has_what_the_interface_promises(tmp_path: Path, bare_output: None) -> None:
    trainer = models.federation(tmp_path, models.token_clients({"ada": 4, "bob": 6}, held_out=2))
    trainer.train()
    content = _json(RunRecord.load(tmp_path))
    promised = "schema_version method options seed versions rounds flagged quarantined clients modules metrics"
    assert set(promised.split()) <= set(content)
    assert {"python", "torch", "transformers", "peft"} <= set(content["versions"])
    for client, count in (("ada", 4), ("bob", 6)):
        facts = content["clients"][client]
        assert {"collaborative", "weight", "num_examples", "evidence", "metrics"} <= set(facts)
        assert facts["collaborative"] is True
        assert facts["num_examples"] == count
        assert set(facts["metrics"]) >= {"before", "global", "personalised"}
        assert {"loss", "perplexity", "token_accuracy"} <= set(facts["metrics"]["global"])
    for module in content["modules"].values():
        assert {"rank", "spectrum", "discarded_energy"} <= set(module)
    assert len(content["modules"]) == 4
    assert {"before", "after"} <= set(content["metrics"])
    mean = sum(content["clients"][c]["metrics"]["global"]["loss"] for c in ("ada", "bob")) / 2
    assert content["metrics"]["after"]["global"]["loss"] == pytest.approx(mean)
    assert [entry["round"] for entry in content["rounds"]] == [1, 2]
    assert content["options"]["local_steps"] == 2


@pytest.mark.parametrize(
    ("earlier", "now", "refused"),
    [
        ({"adam_beta1": 0.8}, {"adam_beta1": 0.7}, "adam_beta1=0.7: the run to resume has 0.8; pass the same"),
        ({}, {"warmup_steps": 3}, "warmup_steps=3: the run to resume has None; pass the same"),
        ({"lora_r": 4}, {"lora_r": 8}, "lora_r=8: the run to resume has 4; pass the same"),
        ({"hub_license": "mit"}, {"hub_license": "apache-2.0"}, None),
        ({}, {"hub_language": ["de"], "hub_with_clients": True, "logging_steps": 3, "push_to_hub": True}, None),
    ],
)
def test_every_option_is_compared_on_resuming_but_those_that_move_no_number(
    earlier: dict[str, Any], now: dict[str, Any], refused: str | None
) -> None:
    before, after = blank(), blank()
    before.options, after.options = earlier, now
    if refused is None:
        check_same_run(before, after)
        return
    with pytest.raises(ConfigError, match=refused):
        check_same_run(before, after)


def test_claimed_and_used_weights_and_who_was_not_believed_are_recorded() -> None:
    updates = sample_updates.cohort(5)
    updates[4] = replace(updates[4], num_examples=10**9)
    combined = aggregate(updates, "multikrum", num_selected=5)
    record = RunRecord(kind="train", method="multikrum", seed=0)
    record.clients = {update.client_id: newcomer(update.num_examples) for update in updates}
    for number in (1, 2):
        add_round(record, number, sorted(record.clients), updates, combined, {}, None, {})
    entry, liar, honest = record.rounds[-1], record.clients["client4"], record.clients["client0"]
    assert entry["claimed_weights"]["client4"] == liar["claimed_weight"] > 0.999
    assert entry["weights"]["client4"] == liar["weight"] == pytest.approx(90 / 190)
    assert list(entry["outlier_claims"]) == ["client4"]
    assert liar["outlier_claim"] == entry["outlier_claims"]["client4"]
    assert liar["num_examples"] == 10**9
    assert honest["outlier_claim"] == ""
    assert honest["claimed_weight"] == pytest.approx(10 / (10**9 + 100))
    first, second = claims_line(record.rounds[:1]), claims_line(record.rounds)
    assert first is not None
    assert first.startswith("warning: client4 claims 1000000000 examples")
    assert second is None  # said once
    assert claims_line([]) is None


def test_a_record_without_claims_is_still_gone_on_from() -> None:
    record = blank([entry(1, "ada bob")])
    update_standing(record)
    assert record.clients["ada"]["claimed_weight"] is None
    assert record.clients["ada"]["outlier_claim"] == ""
