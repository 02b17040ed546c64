"""Rounds on disk: an open round gathers clients' updates, a committed one is renamed into place, whole or not at all.

rounds/3/                 committed: the global adapter, run.json up to here, and
rounds/3/clients/<id>/    each client's own update, a stock PEFT folder beside update.json
rounds/.open-4/           under way: finished clients of the next round, which a resumed run does not train again
"""
# SPDX-License-Identifier: Apache-2.0

import json
import os
import shutil
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from fedlora_hf.errors import AdapterError, RecordError
from fedlora_hf.files import read_adapter, write_adapter
from fedlora_hf.record import RunRecord, write_atomically
from fedlora_hf.update import AdapterState, ClientUpdate, Evidence

UPDATE, FAILURE, FUNCTIONAL = "update.json", "failure.json", "functional.json"


class RoundStore:
    """The folder OUT/rounds. `config` is the adapter_config.json written beside every adapter."""

    def __init__(self, folder: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
        self.folder, self.config = Path(folder), dict(config)

    def committed(self) -> list[int]:
        """Numbers of the committed rounds, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit() and path.is_dir())

    def clear(self) -> None:
        """Forget every round: a new run begins."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def forget_after(self, number: int) -> None:
        """Remove the committed rounds after `number` and any open one but the next: the run goes on from there."""
        for later in self.committed():
            if later > number:
                shutil.rmtree(self.folder / str(later))
        for path in self.folder.glob(".open-*"):
            if path.name != f".open-{number + 1}":
                shutil.rmtree(path)

    def record(self, number: int) -> RunRecord:
        return RunRecord.load(self.folder / str(number))

    def state(self, number: int) -> AdapterState:
        """The global adapter of a committed round."""
        return read_adapter(self.folder / str(number))[0]

    def update(self, number: int, client_id: str) -> ClientUpdate:
        """A client's own update of a round, open or committed; its tensors are read when they are asked for."""
        return self._read(self._place(number), client_id)

    def finished(self, number: int, client_id: str) -> ClientUpdate | None:
        """The update a client has already left in an open round, or None: not trained yet, or left damaged."""
        try:
            return self._read(self._open(number), client_id)
        except (AdapterError, RecordError):
            return None

    def save(self, number: int, update: ClientUpdate) -> ClientUpdate:
        """Put a client's update into the open round; what comes back reads it from disk."""
        place = self._open(number) / "clients" / update.client_id
        draft = place.with_name(f".{update.client_id}.tmp")
        shutil.rmtree(draft, ignore_errors=True)
        write_adapter(draft, update.state, self.config)
        facts = {"num_examples": update.num_examples, "metrics": dict(update.metrics)}
        write_atomically(draft / UPDATE, json.dumps(facts).encode())
        shutil.rmtree(place, ignore_errors=True)
        os.rename(draft, place)
        return self._read(self._open(number), update.client_id)

    def kept(self, number: int, client_id: str) -> ClientUpdate | None:
        """The client's update of a committed round, or None where it is not here (the round came from the Hub)."""
        return self.update(number, client_id) if (self._place(number) / "clients" / client_id).is_dir() else None

    def adopt(self, number: int, state: AdapterState, record: RunRecord) -> None:
        """Commit a round that was run elsewhere."""
        self.begin(number)
        self.commit(number, state, record)

    def begin(self, number: int) -> None:
        """Make sure that the open round's folder is there."""
        self._open(number).mkdir(parents=True, exist_ok=True)

    def fail(self, number: int, client_id: str, reason: str) -> None:
        """Note in the open round that a client could not be trained, and why."""
        write_atomically(self._open(number) / "clients" / client_id / FAILURE, json.dumps(reason).encode())

    def failure(self, number: int, client_id: str) -> str | None:
        """Why a client of a round, open or committed, could not be trained, or None."""
        path = self._place(number) / "clients" / client_id / FAILURE
        return str(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def commit(self, number: int, state: AdapterState, record: RunRecord) -> None:
        """Close the open round: write the global adapter and the record into it, then rename it, synced, into place."""
        place = self._open(number)
        write_adapter(place, state, self.config)
        record.save(place)
        for path in sorted(place.rglob("*")):
            _sync(path)
        _sync(place)
        os.rename(place, self.folder / str(number))
        _sync(self.folder)

    def note_functional(self, number: int, evidence: Mapping[str, Evidence]) -> None:
        """Keep the functional evidence of an open round beside its updates: aggregation reads it from there."""
        content = {client: list(item) for client, item in evidence.items()}
        write_atomically(self._open(number) / FUNCTIONAL, json.dumps(content).encode())

    def functional(self, number: int) -> dict[str, Evidence]:
        """The functional evidence of a round, open or committed; {} when none was taken."""
        path = self._place(number) / FUNCTIONAL
        if not path.is_file():
            return {}
        return {client: Evidence(*item) for client, item in json.loads(path.read_text(encoding="utf-8")).items()}

    def amend(self, number: int, record: RunRecord) -> None:
        """Replace the record of a committed round by one that knows more of it, such as its metrics."""
        record.save(self.folder / str(number))

    def prune(self, keep: int, needed: Iterable[tuple[int, str]], bases: Container[int] = ()) -> None:
        """Remove committed rounds but the last `keep` (0: none is removed), except the updates that are `needed`.

        needed: (round, client id). bases: rounds whose global adapter is needed.
        """
        if not keep:
            return
        needed = set(needed)
        for number in self.committed()[:-keep]:
            place = self.folder / str(number)
            clients = place / "clients"
            for client in clients.iterdir() if clients.is_dir() else ():
                if (number, client.name) not in needed:
                    shutil.rmtree(client)
            if number not in bases and not any((number, client_id) in needed for client_id in _names(clients)):
                shutil.rmtree(place)

    def _place(self, number: int) -> Path:
        committed = self.folder / str(number)
        return committed if committed.is_dir() else self._open(number)

    def _open(self, number: int) -> Path:
        return self.folder / f".open-{number}"

    def _read(self, place: Path, client_id: str) -> ClientUpdate:
        folder = place / "clients" / client_id
        state, _ = read_adapter(folder)
        try:
            facts = json.loads((folder / UPDATE).read_text(encoding="utf-8"))
            return ClientUpdate(client_id, state, facts["num_examples"], facts["metrics"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecordError(f"{folder / UPDATE}: not readable ({type(error).__name__}); train it again") from None


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
