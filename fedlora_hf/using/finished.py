"""A finished run's output folder: which adapters it has, on which base, for which task, in whose words."""
# SPDX-License-Identifier: Apache-2.0

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fedlora_hf.adapter.files import CONFIG, read_config
from fedlora_hf.errors import ConfigError, RecordError, one_line
from fedlora_hf.methods.clair import FIRST
from fedlora_hf.record.group_names import group_names
from fedlora_hf.record.record import RunRecord
from fedlora_hf.rounds.groups import GROUPS
from fedlora_hf.rounds.output import CLIENTS
from fedlora_hf.util.names import unfit_reason

# task of a record: PEFT's name of it, for adapters whose config names none.
_TASK_TYPES = {
    "causal_lm": "CAUSAL_LM",
    "sequence_classification": "SEQ_CLS",
    "seq_2_seq_lm": "SEQ_2_SEQ_LM",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
    "feature_extraction": "FEATURE_EXTRACTION",
}


@dataclass(frozen=True)
class Adapter:
    """One that can be used. name: "base" (no adapter), "global", "group 2", or a client's id; folder: None for the base
    alone."""

    name: str
    folder: Path | None


BASE = Adapter("base", None)


@dataclass(frozen=True)
class Finished:
    """An output folder of train, demo or aggregate. config: adapter_config.json of its global adapter."""

    folder: Path
    record: RunRecord
    config: Mapping[str, Any]

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> "Finished":
        """What `folder` holds; RecordError or AdapterError, one line, for a folder that is no finished run's."""
        folder = Path(folder)
        if not folder.is_dir():
            raise RecordError(f"{folder}: no such folder; give the output folder of fedlora train, demo or aggregate")
        record = RunRecord.load(folder)
        return cls(folder, record, read_config(folder))

    @property
    def task_type(self) -> str:
        """PEFT's name of the task: "CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM" ..."""
        return str(self.config.get("task_type") or _TASK_TYPES.get(str(self.record.model.get("task")), "CAUSAL_LM"))

    @property
    def wording(self) -> Mapping[str, Any]:
        """How the examples were worded, as the run recorded it; {} where it did not."""
        found = self.record.data.get("wording")
        return found if isinstance(found, dict) else {}

    @property
    def labels(self) -> list[str] | None:
        """The classes of a classifier in the order of their numbers, None where the run did not record them."""
        found = self.record.model.get("labels") or self.record.options.get("labels")
        return [str(label) for label in found] if isinstance(found, list) and found else None

    @property
    def clients(self) -> list[str]:
        """The clients that have a personal adapter here, sorted."""
        place = self.folder / CLIENTS
        names = sorted(entry.name for entry in place.iterdir()) if place.is_dir() and not place.is_symlink() else []
        fit = [name for name in names if unfit_reason(name) is None]
        return [name for name in fit if (place / name / CONFIG).is_file()]

    @property
    def groups(self) -> list[str]:
        """The groups besides the first that have a global adapter of their own here, in order."""
        place = self.folder / GROUPS
        known = [] if place.is_symlink() else group_names(self.record)
        return [name for name in known if (place / name / CONFIG).is_file()]

    def adapters(
        self, clients: Sequence[str] = (), everything: bool = False, groups: Sequence[str] = ()
    ) -> list[Adapter]:
        """The adapters asked for: the groups' and clients' (by id, or by the name a client has in the data), else the
        global one, which is the first group's.

        everything: the base and the global adapters too and, where no client is named, every client's. Raises
        ConfigError for a client without a personal adapter here, and a group that is not.
        """
        named = [*map(self._group, groups), *map(self._personal, clients)]
        whole = Adapter("global", self.folder)
        if not everything:
            return named or [whole]
        every = [*map(self._group, self.groups), *map(self._personal, self.clients)]
        return [BASE, whole, *(named or every)]

    def _group(self, name: str) -> Adapter:
        if name == FIRST:
            return Adapter("global", self.folder)
        if name not in self.groups:
            known = ", ".join([FIRST, *self.groups])
            raise ConfigError(f"group={one_line(name, 60)!r}: is no group of {self.folder}; known are {known}")
        return Adapter(f"group {name}", self.folder / GROUPS / name)

    def _personal(self, given: str) -> Adapter:
        told = self.record.data.get("names")
        ids = {str(name): str(client) for client, name in told.items()} if isinstance(told, dict) else {}
        known = self.clients
        client = given if given in known else ids.get(given, given)
        if client in known:
            return Adapter(client, self.folder / CLIENTS / client)
        rule = "has no personal adapter in this run"
        if client in self.record.quarantined:
            reason = f"{rule}: it was quarantined ({one_line(self.record.quarantined[client], 80)})"
        elif client in self.record.flagged:
            reason = f"{rule}: it was flagged"
        else:
            meant = get_close_matches(given, [*known, *ids], 1)
            some = f"did you mean {meant[0]!r}?" if meant else f"known are {', '.join(known[:8]) or 'none'}"
            raise ConfigError(f"client={one_line(given, 60)!r}: is no client of {self.folder} with an adapter; {some}")
        raise ConfigError(f"client={client!r}: {reason}; leave out --client for the global adapter")
