"""The store of rounds: an open round gathers updates, a committed one is whole; what is no longer needed goes."""
# SPDX-License-Identifier: Apache-2.0

import os
from pathlib import Path

import pytest
import sample_updates

from fedlora_hf.errors import AdapterError, RecordError, StorageError
from fedlora_hf.record.record import RunRecord
from fedlora_hf.rounds.store import RoundStore
from fedlora_hf.update import ClientUpdate

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
CLIENTS = sample_updates.cohort(3)
RECORD = RunRecord(kind="train", method="fedavg", seed=0)


@pytest.fixture
def store(tmp_path: Path) -> RoundStore:
    return RoundStore(tmp_path / "rounds", CONFIG)


def fill(store: RoundStore, number: int, clients: list[ClientUpdate] = CLIENTS) -> None:
    for client in clients:
        store.save(number, client)
    store.commit(number, CLIENTS[0].state, RECORD)


def tree(store: RoundStore) -> list[str]:
    return sorted(str(path.relative_to(store.folder)) for path in store.folder.rglob("*") if path.is_dir())


def test_an_update_is_read_as_it_was_saved(store: RoundStore) -> None:
    saved = ClientUpdate("client0", CLIENTS[0].state, 7, {"train_loss": 0.5, "steps": 3})
    for found in (store.save(2, saved), store.finished(2, "client0"), store.update(2, "client0")):
        assert found is not None
        assert sample_updates.same_bits(found.state, saved.state)
        assert (found.client_id, found.num_examples, dict(found.metrics)) == ("client0", 7, saved.metrics)
    unknown = ClientUpdate("client1", CLIENTS[1].state)
    assert store.save(2, unknown).num_examples is None
    assert store.finished(2, "client2") is None
    assert store.committed() == []


def test_saving_again_replaces(store: RoundStore) -> None:
    store.save(1, CLIENTS[0])
    store.save(1, ClientUpdate("client0", CLIENTS[1].state, 1))
    assert sample_updates.same_bits(store.update(1, "client0").state, CLIENTS[1].state)


def test_a_committed_round_holds_state_record_and_updates(store: RoundStore) -> None:
    fill(store, 1)
    assert store.committed() == [1]
    assert sample_updates.same_bits(store.state(1), CLIENTS[0].state)
    assert store.record(1) == RECORD
    assert sample_updates.same_bits(store.update(1, "client2").state, CLIENTS[2].state)
    assert store.finished(1, "client2") is None  # it asks for open rounds


def test_a_crash_before_the_rename_leaves_the_round_open(store: RoundStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for client in CLIENTS:
        store.save(1, client)

    def crash(source: object, target: object) -> None:
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", crash)
        with pytest.raises(OSError, match="power cut"):
            store.commit(1, CLIENTS[0].state, RECORD)
    assert store.committed() == []
    assert all(store.finished(1, client.client_id) is not None for client in CLIENTS)
    store.commit(1, CLIENTS[0].state, RECORD)
    assert store.committed() == [1]


def test_a_draft_that_was_left_is_no_client(store: RoundStore) -> None:
    store.save(1, CLIENTS[0])
    place = store.folder / ".open-1" / "clients"
    os.rename(place / "client0", place / ".client0.tmp")
    assert store.finished(1, "client0") is None
    store.save(1, CLIENTS[0])
    assert sorted(path.name for path in place.iterdir()) == ["client0"]


@pytest.mark.parametrize("content", ["{", "[]", '{"num_examples": 1}'])
def test_damaged_facts_are_not_a_finished_client(store: RoundStore, content: str) -> None:
    store.save(1, CLIENTS[0])
    (store.folder / ".open-1" / "clients" / "client0" / "update.json").write_text(content)
    assert store.finished(1, "client0") is None
    with pytest.raises(RecordError, match=r"update\.json: not readable .* train it again"):
        store.update(1, "client0")


def test_a_failure_is_remembered_until_the_client_is_trained(store: RoundStore) -> None:
    store.fail(1, "client0", "too hot")
    assert store.failure(1, "client0") == "too hot"
    assert store.finished(1, "client0") is None
    store.save(1, CLIENTS[1])
    assert store.failure(1, "client1") is None
    store.commit(1, CLIENTS[0].state, RECORD)
    assert store.failure(1, "client0") == "too hot"
    store.fail(2, "client0", "too cold")
    store.save(2, CLIENTS[0])
    assert store.failure(2, "client0") is None


def test_forgetting_keeps_the_open_round_that_comes_next(store: RoundStore) -> None:
    for number in (1, 2, 3):
        fill(store, number)
    store.save(4, CLIENTS[0])
    store.forget_after(3)
    assert store.finished(4, "client0") is not None
    store.forget_after(1)
    assert store.committed() == [1]
    assert store.finished(4, "client0") is None
    store.clear()
    assert store.committed() == []
    assert not store.folder.exists()
    store.clear()


def test_pruning_keeps_what_is_needed(store: RoundStore) -> None:
    for number in range(1, 7):
        fill(store, number)
    store.prune(2, [(2, "client1"), (5, "client0"), (6, "client0")], bases={3})
    assert store.committed() == [2, 3, 5, 6]
    assert tree(store) == [
        *("2", "2/clients", "2/clients/client1", "3", "3/clients"),
        *("5", "5/clients", "5/clients/client0", "5/clients/client1", "5/clients/client2"),
        *("6", "6/clients", "6/clients/client0", "6/clients/client1", "6/clients/client2"),
    ]
    assert store.state(3) is not None
    with pytest.raises(AdapterError):
        store.state(4)


def test_nothing_is_pruned_when_all_are_kept(store: RoundStore) -> None:
    for number in (1, 2, 3):
        fill(store, number)
    before = tree(store)
    store.prune(0, [])
    assert tree(store) == before
    store.prune(3, [])
    assert tree(store) == before


def test_a_failure_is_never_noted_through_a_link_nor_an_update_taken_from_behind_one(
    store: RoundStore, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    place = store.folder / ".open-1" / "clients"
    place.mkdir(parents=True)
    (place / "client0").symlink_to(victim)
    store.fail(1, "client0", "training failed")
    assert list(victim.iterdir()) == []
    assert store.failure(1, "client0") == "training failed"
    store.save(1, CLIENTS[1])
    (place / "client1").rename(tmp_path / "elsewhere")
    (place / "client1").symlink_to(tmp_path / "elsewhere")
    assert store.finished(1, "client1") is None
    with pytest.raises(StorageError, match="is a link"):
        store.update(1, "client1")
    store.save(1, CLIENTS[1])
    assert store.finished(1, "client1") is not None
    assert not (place / "client1").is_symlink()
