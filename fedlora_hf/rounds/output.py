"""The output folder of a run: adapters as stock PEFT folders, the record, the card and the report."""
# SPDX-License-Identifier: Apache-2.0

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedlora_hf.adapter.files import WEIGHTS, read_adapter, write_adapter
from fedlora_hf.errors import ConfigError, RecordError
from fedlora_hf.hub import write_card
from fedlora_hf.record.record import RunRecord
from fedlora_hf.report import write_report
from fedlora_hf.rounds.groups import write_groups
from fedlora_hf.rounds.store import RoundStore
from fedlora_hf.update import AdapterState
from fedlora_hf.util.disk import remove_tree
from fedlora_hf.util.sums import file_sha256

CLIENTS = "clients"
_DRAFT = ".clients.tmp"


class ClientFolders:
    """OUT/clients: personal adapters are written beside it, and put in its place when all are there."""

    def __init__(self, folder: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
        self.folder, self.config = Path(folder), dict(config)

    def begin(self) -> None:
        """Forget a draft that an earlier, interrupted run left."""
        remove_tree(self.folder / _DRAFT)
        (self.folder / _DRAFT).mkdir(parents=True)

    def write(self, client_id: str, state: AdapterState, config: Mapping[str, Any] | None = None) -> None:
        """config: of this client's adapter, where it differs from the run's."""
        write_adapter(self.folder / _DRAFT / client_id, state, self.config if config is None else config)

    def publish(self) -> None:
        """Replace OUT/clients by what was written since `begin`."""
        remove_tree(self.folder / CLIENTS)
        os.rename(self.folder / _DRAFT, self.folder / CLIENTS)

    def read(self, client_ids: Iterable[str]) -> dict[str, AdapterState]:
        """{client id: its personal adapter}, read lazily, of those that have one."""
        return {
            client_id: read_adapter(self.folder / CLIENTS / client_id)[0]
            for client_id in client_ids
            if (self.folder / CLIENTS / client_id).is_dir()
        }


def write_run(
    folder: str | os.PathLike[str],
    state: AdapterState,
    config: Mapping[str, Any],
    record: RunRecord,
    groups: Mapping[str, AdapterState] | None = None,
    *,
    report: bool = True,
) -> None:
    """Write the global adapter, those of further groups, run.json, the report (unless told not to) and the card, each
    file whole or not."""
    folder = Path(folder)
    write_adapter(folder, state, config)
    write_groups(folder, groups or {}, config)
    record.sha256["adapter"] = file_sha256(folder / WEIGHTS)
    record.save(folder)
    if report:
        write_report(record, folder)
    write_card(folder)


def check_overwrite(output_dir: str | None, store: RoundStore) -> None:
    """A finished run may be run again; an unfinished one is not thrown away without being told."""
    committed = store.committed()
    if not committed or not output_dir:
        return
    try:
        finished = len(RunRecord.load(output_dir).rounds) >= committed[-1]
    except RecordError:
        finished = False
    if not finished:
        raise ConfigError(
            f"output_dir={output_dir!r}: holds an unfinished run (round {committed[-1]} is committed); pass "
            "--resume_from last to go on, another --output_dir, or delete its folder rounds"
        )


def has_finished_run(folder: str) -> bool:
    """Whether the folder holds the result of at least one round."""
    try:
        return len(RunRecord.load(folder).rounds) > 0
    except RecordError:
        return False


def check_untrained(folder: str) -> None:
    """ConfigError where an adapter that nobody trained would take the place of a run's result."""
    if has_finished_run(folder):
        raise ConfigError(
            f"{folder!r}: holds a finished run, and this trainer has trained nothing that could take its place; "
            "call train() first, or save into another folder"
        )
