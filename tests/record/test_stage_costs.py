"""What a stage costs, read from records of every kind: whole, of an older version, or somebody else's."""
# SPDX-License-Identifier: Apache-2.0

import pytest

from fedlora_hf.record.record import RunRecord
from fedlora_hf.record.stage_costs import stage_costs


def entry(number, stage="federated", **more):
    return {"round": number, "stage": stage, **more}


def record(rounds, clients=None):
    return RunRecord(kind="train", method="fedavg", seed=0, rounds=rounds, clients=clients or {})


def test_rounds_add_up_and_clients_are_averaged():
    rounds = [
        entry(1, bytes_up={"a": 10, "b": 30}, bytes_stored={"a": 40, "b": 40}, changed={"A.direction": 0.1}),
        entry(2, bytes_up={"a": 10}, bytes_stored={"a": 20}, changed={"A.direction": 0.3}),
        entry(3, "global", parts=["A.direction"], bytes_up={"a": 5}),
    ]
    first, second = stage_costs(record(rounds))
    assert (first.stage, first.rounds, first.parts, first.up, first.down) == ("federated", "1 to 2", "", 30, None)
    assert first.stored == 30
    assert first.moved == {"A.direction": pytest.approx(0.2)}
    assert (second.stage, second.rounds, second.parts, second.up) == ("global", "3", "A.direction", 5)


def test_a_stage_may_come_again():
    rounds = [entry(1), entry(2, "global"), entry(3), entry(4, "global")]
    assert [cost.rounds for cost in stage_costs(record(rounds))] == ["1", "2", "3", "4"]


def test_personal_steps_are_a_stage_and_a_choice_alone_is_not():
    chosen = {"choice": "own", "parts": [], "changed": {}, "bytes_stored": 100}
    tuned = {"choice": "global, tuned", "parts": ["B.magnitude"], "changed": {"B.magnitude": 0.5}, "bytes_stored": 20}
    assert stage_costs(record([], {"a": {"personal": chosen}})) == []
    (cost,) = stage_costs(record([], {"a": {"personal": chosen}, "b": {"personal": tuned}}))
    assert (cost.stage, cost.parts, cost.up, cost.stored) == ("personal", "B.magnitude", 0, 60)
    assert cost.moved == {"B.magnitude": 0.5}


def test_whatever_a_record_holds_is_no_error():
    rounds = [entry(None, stage=None, bytes_up="much", changed=[1], parts=[3, None]), entry({}, bytes_up={"a": None})]
    clients = {"a": {"personal": "mine"}, "b": {"personal": {"parts": "A", "changed": 3}}, "c": {}}
    costs = stage_costs(record(rounds, clients))
    assert [(cost.up, cost.parts, cost.moved) for cost in costs] == [(None, "", {}), (None, "", {})]
