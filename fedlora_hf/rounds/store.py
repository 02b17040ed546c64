"""Rounds on disk: an open round gathers clients' updates, a committed one is renamed into place, whole or not at all.

rounds/3/                 committed: the global adapter, run.json up to here, and
rounds/3/server.safetensors   what the server remembers (its optimizer's state, SCAFFOLD's control variate), and
rounds/3/server/          its own update, where the run has these; a client's control.safetensors is its variate
rounds/3/                 committed: the global adapter, run.json up to here, SHA256SUMS of all its files, and
rounds/3/clients/<id>/    each client's own update, a stock PEFT folder beside update.json
rounds/.open-4/           under way: finished clients of the next round, which a resumed run does not train again
"""
# SPDX-License-Identifier: Apache-2.0

import json
import os
import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from fedlora_hf.adapter.files import read_adapter, write_adapter
from fedlora_hf.aggregation.soundness import unsound_state
from fedlora_hf.errors import AdapterError, ConfigError, FedLoraError, RecordError, StorageError, one_line
from fedlora_hf.record.record import FILE_NAME, RunRecord, check_complete
from fedlora_hf.rounds.functional_file import read_functional, write_functional
from fedlora_hf.rounds.groups import GROUPS, read_groups, write_groups
from fedlora_hf.rounds.judges import Functional
from fedlora_hf.rounds.memory import read_tensors
from fedlora_hf.update import AdapterState, ClientUpdate
from fedlora_hf.util.disk import read_json, remove_tree, sweep, sync, within, write_atomically
from fedlora_hf.util.sums import changed_file, write_sums

UPDATE, FAILURE, OPTIMIZER = "update.json", "failure.json", "optimizer.safetensors"
MEMORY, SERVER, CONTROL = "server.safetensors", "server", "control.safetensors"
MAX_NOTE_BYTES = 16 * 1024**2
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")


class RoundStore:
    """The folder OUT/rounds. `config` is the adapter_config.json written beside every adapter."""

    def __init__(self, folder: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
        folder = Path(folder)
        self.folder, self.config = within(folder.parent, folder.name), dict(config)
        self.protected: set[int] = set()  # rounds whose global adapter `prune` leaves

    def committed(self) -> list[int]:
        """Numbers of the committed rounds, ascending."""
        if not self.folder.is_dir():
            return []
        found = (path for path in self.folder.iterdir() if _NUMBER.fullmatch(path.name))
        return sorted(int(path.name) for path in found if path.is_dir() and not path.is_symlink())

    def damage(self, number: int) -> str | None:
        """Why a run cannot go on from a committed round (a file cut short, say), in one line; None when it can.

        Every file that lies there is as its sha256 tells, and so are the updates that earlier rounds keep; its record,
        its global adapter and the headers of its updates are read.
        """
        place = self.folder / str(number)
        try:
            for earlier in self.committed():
                kept = "" if earlier == number else "clients/"
                if earlier <= number and (reason := changed_file(self.folder / str(earlier), kept)):
                    return f"{self.folder / str(earlier)}: {reason}"
            check_complete(self.record(number), number, str(place))
            self.memory(number)
            for state in (self.state(number), *self.groups(number).values()):
                if reason := unsound_state(state):
                    return f"{place}: {reason}"
            for client_id in _names(within(self.folder, str(number), "clients")):
                if not (self.folder / str(number) / "clients" / client_id / FAILURE).is_file():
                    self.update(number, client_id)
        except FedLoraError as error:
            return str(error)
        except (OSError, ValueError) as error:
            return f"{place}: {one_line(error, 120)}"
        return None

    def last_sound(self) -> tuple[int, str | None]:
        """(the last committed round that a run can go on from, what is wrong with those after it); 0 when none is
        committed. RecordError when rounds are committed and none of them is sound."""
        reason = None
        for number in reversed(self.committed()):
            damage = self.damage(number)
            if damage is None:
                return number, reason
            reason = reason or damage
        if reason is not None:
            raise RecordError(f"{reason}; no earlier round can be resumed either: run again without --resume_from")
        return 0, None

    def resumed(self, resume: str) -> tuple[int, str | None]:
        """(the committed round that `resume` names, what is wrong with later ones); 0: "last", and there is none.

        ConfigError for a round that is not there, RecordError for one that is damaged.
        """
        if resume == "last":
            return self.last_sound()
        committed = self.committed()
        if resume not in map(str, committed):
            have = ", ".join(map(str, committed)) or "none"
            raise ConfigError(f"resume_from={resume!r}: must be 'last' or a committed round ({have}); see rounds/")
        if damage := self.damage(int(resume)):
            raise RecordError(f"{damage}; pass --resume_from last for the last round that is whole")
        return int(resume), None

    def clear(self) -> None:
        """Forget every round: a new run begins."""
        remove_tree(self.folder)

    def forget_after(self, number: int) -> None:
        """Remove the committed rounds after `number` and any open one but the next: the run goes on from there.

        Rounds go one by one, the last first, so that a run that is killed meanwhile finds an unbroken row of them."""
        found = [path for path in self.folder.glob("*") if _NUMBER.fullmatch(path.name)]
        for later in sorted(found, key=lambda path: -int(path.name)):
            if int(later.name) > number:
                remove_tree(later)
        for path in self.folder.glob(".open-*"):
            if path.name != f".open-{number + 1}" or path.is_symlink() or not path.is_dir():
                remove_tree(path)
            for inner in ("clients", SERVER):
                if (path / inner).is_symlink():
                    remove_tree(path / inner)
        for folder in (self.folder, self._open(number + 1), self._open(number + 1) / "clients"):
            sweep(folder)

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
        except (AdapterError, RecordError, StorageError):
            return None

    def save_groups(self, number: int, states: Mapping[str, AdapterState]) -> None:
        """Put the groups' global adapters into the open round; the first one's is the round's own."""
        write_groups(self._open(number), states, self.config)

    def groups(self, number: int) -> dict[str, AdapterState]:
        """{name: its global adapter} of the groups besides the first after a committed round, read lazily."""
        return read_groups(self.folder / str(number))

    def save(self, number: int, update: ClientUpdate, optimizer: bytes = b"") -> ClientUpdate:
        """Put a client's update into the open round; what comes back reads it from disk.

        optimizer: state of its optimizer, that it goes on with; it is never sent.
        """
        place = self._open(number) / "clients" / update.client_id
        draft = place.with_name(f".{update.client_id}.tmp")
        remove_tree(draft)
        write_adapter(draft, update.state, self.config)
        facts = {"num_examples": update.num_examples, "metrics": dict(update.metrics)}
        if update.control:
            write_atomically(draft / CONTROL, safetensors_bytes(dict(update.control)))
        write_atomically(draft / UPDATE, json.dumps(facts).encode())
        if optimizer:
            write_atomically(draft / OPTIMIZER, optimizer)
        remove_tree(place)
        os.rename(draft, place)
        return self._read(self._open(number), update.client_id)

    def optimizer(self, number: int, client_id: str) -> bytes:
        """The state that a client's optimizer was left in by a round; b"" where there is none."""
        path = within(self._place(number), "clients") / client_id / OPTIMIZER
        return path.read_bytes() if path.is_file() and not path.is_symlink() else b""

    def kept(self, number: int, client_id: str) -> ClientUpdate | None:
        """The client's update of a committed round, or None where it is not here (the round came from the Hub)."""
        return self.update(number, client_id) if (self._place(number) / "clients" / client_id).is_dir() else None

    def adopt(self, number: int, state: AdapterState, record: RunRecord, groups: Mapping[str, AdapterState]) -> None:
        """Commit a round that was run elsewhere."""
        self.open(number)
        self.save_groups(number, groups)
        self.commit(number, state, record)

    def open(self, number: int, record: RunRecord | None = None) -> None:
        """Make sure that the open round's folder is there. record: of the run so far, for `open_round_record`."""
        self._open(number).mkdir(parents=True, exist_ok=True)
        if record is not None:
            record.save(self._open(number))

    def open_round_record(self, number: int) -> RunRecord | None:
        """The record that the open round `number` was opened with; None when there is no such round, or none readable.

        A first round has no committed one before it that would tell which run its updates belong to."""
        try:
            return RunRecord.load(self._open(number))
        except RecordError:
            return None

    def fail(self, number: int, client_id: str, reason: str) -> None:
        """Note in the open round that a client could not be trained, and why."""
        place = self._open(number) / "clients" / client_id
        if place.is_symlink():  # what it leads to is not ours to write into
            remove_tree(place)
        write_atomically(place / FAILURE, json.dumps(reason).encode())

    def failure(self, number: int, client_id: str) -> str | None:
        """Why a client of a round, open or committed, could not be trained, or None."""
        path = self._place(number) / "clients" / client_id / FAILURE
        try:
            return one_line(read_json(path, MAX_NOTE_BYTES)) if path.is_file() else None
        except (OSError, ValueError):
            return "training failed; the note of why cannot be read"

    def memory(self, number: int) -> dict[str, Tensor]:
        """What the server remembers after a committed round, named tensors; {} for nothing."""
        return read_tensors(self.folder / str(number) / MEMORY)

    def control(self, number: int, client_id: str) -> dict[str, Tensor]:
        """The control variate that a client left in a round; {} where it left none."""
        return read_tensors(self._place(number) / "clients" / client_id / CONTROL)

    def save_server(self, number: int, update: ClientUpdate) -> None:
        """Put what was trained on the server's own data into the open round, beside the clients' updates."""
        place = self._open(number) / SERVER
        draft = place.with_name(f".{SERVER}.tmp")
        remove_tree(draft)
        write_adapter(draft, update.state, self.config)
        remove_tree(place)
        os.rename(draft, place)

    def server_update(self, number: int) -> AdapterState | None:
        """What a round, open or committed, trained on the server's own data to compare clients with; None: nothing."""
        place = self._place(number) / SERVER
        return read_adapter(place)[0] if place.is_dir() and not place.is_symlink() else None

    def commit(
        self, number: int, state: AdapterState, record: RunRecord, memory: Mapping[str, Tensor] | None = None
    ) -> None:
        """Close the open round: write the global adapter and the record into it, then rename it, synced, into place.

        memory: what the server remembers, written beside the adapter."""
        place = self._open(number)
        write_adapter(place, state, self.config)
        if memory:
            write_atomically(place / MEMORY, safetensors_bytes({name: t.contiguous() for name, t in memory.items()}))
        record.save(place)
        write_sums(place)
        for path in sorted(place.rglob("*")):
            sync(path)
        sync(place)
        os.rename(place, self.folder / str(number))
        sync(self.folder)

    def note_functional(self, number: int, found: Functional) -> None:
        """Keep the functional evidence of an open round beside its updates: aggregation reads it from there."""
        write_functional(self._open(number), found)

    def functional(self, number: int) -> Functional:
        """The functional evidence of a round, open or committed; empty when none was taken."""
        return read_functional(self._place(number))

    def amend(self, number: int, record: RunRecord) -> None:
        """Replace the record of a committed round by one that knows more of it, such as its metrics."""
        record.save(self.folder / str(number))
        write_sums(self.folder / str(number), FILE_NAME)

    def prune(self, keep: int, needed: Iterable[tuple[int, str]], bases: Container[int] = ()) -> None:
        """Remove committed rounds but the last `keep` (0: none is removed), except the updates that are `needed`.

        needed: (round, client id). bases: rounds whose global adapter is needed.
        """
        if not keep:
            return
        needed = set(needed)
        for number in self.committed()[:-keep]:
            place = self.folder / str(number)
            remove_tree(place / SERVER)
            remove_tree(place / MEMORY)
            remove_tree(place / GROUPS)
            clients = within(place, "clients")
            for client in clients.iterdir() if clients.is_dir() else ():
                if (number, client.name) not in needed:
                    remove_tree(client)
            if (
                number not in bases
                and number not in self.protected
                and not any((number, client_id) in needed for client_id in _names(clients))
            ):
                remove_tree(place)

    def _place(self, number: int) -> Path:
        committed = self.folder / str(number)
        return committed if committed.is_dir() else self._open(number)

    def _open(self, number: int) -> Path:
        return self.folder / f".open-{number}"

    def _read(self, place: Path, client_id: str) -> ClientUpdate:
        folder = within(place, "clients", client_id)
        state, _ = read_adapter(folder)
        try:
            facts = read_json(folder / UPDATE, MAX_NOTE_BYTES)
            metrics = {str(name): float(value) for name, value in facts["metrics"].items() if value is not None}
            return ClientUpdate(client_id, state, facts["num_examples"], metrics)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecordError(f"{folder / UPDATE}: not readable ({type(error).__name__}); train it again") from None


def _names(folder: Path) -> list[str]:
    """Names in a folder, sorted, without drafts."""
    return sorted(path.name for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []


def unlike(state: AdapterState, other: AdapterState) -> str | None:
    """Why two adapters are not of one model (modules, shapes), or None."""
    for module in sorted({*state, *other}):
        if module not in state or module not in other:
            return f"module {module} is in one of them only"
        if state[module].shape != other[module].shape:
            return f"module {module} is {state[module].shape} in one of them and {other[module].shape} in the other"
    return None
