"""Pushes while training goes on: the folder is copied first, then sent from a thread of its own."""
# SPDX-License-Identifier: Apache-2.0

import logging
import os
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from fedlora_hf.errors import FedLoraError
from fedlora_hf.hub.plan import Plan, make_plan
from fedlora_hf.hub.push import push_plan, warn_of_clients
from fedlora_hf.hub.talk import check_repo_id
from fedlora_hf.record.record import RunRecord
from fedlora_hf.util.progress import Progress

logger = logging.getLogger(__name__)


class BackgroundPusher:
    """Pushes of rounds as they end, one after the other, in one thread.

    A round that ends while the last push is still under way is skipped unless always=True (then it waits in line), as
    `TrainingArguments.hub_always_push` says. A push that fails is reported and does not stop the training: the next
    push holds everything anyway. `progress`, where given, gets a line for each that has arrived.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        private: bool = True,
        with_clients: bool = False,
        with_client_facts: bool = False,
        token: str | bool | None = None,
        revision: str | None = None,
        always: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self._repo_id = check_repo_id(repo_id)
        self._private, self._always = private, always
        self._with = (with_clients, with_client_facts)
        self._token, self._revision = token, revision
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hub-push")
        self._pushes: list[Future[str | None]] = []
        self._warned = False
        self._progress = progress or Progress(enabled=False)

    def submit(self, folder: str | os.PathLike[str], tag: str | None = None, commit_message: str | None = None) -> bool:
        """Copy what is to be pushed of `folder` and queue it; False when skipped because a push is under way.

        Bad folders raise at once (AdapterError, RecordError, ConfigError); the Hub's refusals are logged later.
        """
        if not self._always and self._pushes and not self._pushes[-1].done():
            return False
        record = RunRecord.load(folder)
        plan = make_plan(Path(folder), record, self._repo_id, *self._with)
        if not self._warned:
            warn_of_clients(plan, self._repo_id)
            self._warned = True
        message = commit_message or f"{record.method}, {len(record.rounds)} rounds"
        copy = tempfile.TemporaryDirectory(prefix="fedlora-push-")
        try:
            copied = _copied(plan, Path(copy.name))
        except OSError:
            copy.cleanup()
            raise
        self._pushes.append(self._thread.submit(self._push, copied, copy, tag, message))
        return True

    def _push(self, plan: Plan, copy: "tempfile.TemporaryDirectory[str]", tag: str | None, message: str) -> str | None:
        try:
            url = push_plan(
                plan,
                self._repo_id,
                private=self._private,
                token=self._token,
                revision=self._revision,
                tag=tag,
                commit_message=message,
            )
            # One line, not a bar: the terminal belongs to the training.
            self._progress.say(f"pushed in the background: {message}, {url}")
            return url
        except FedLoraError as error:
            logger.warning("push in the background failed: %s", error)
            return None
        finally:
            copy.cleanup()

    def finish(self) -> str | None:
        """Wait for the pushes; the address of the last commit, or None when the last push failed or none was made."""
        try:
            return self._pushes[-1].result() if self._pushes else None
        finally:
            self._thread.shutdown(wait=True)


def _copied(plan: Plan, folder: Path) -> Plan:
    """The plan with every file copied into `folder`, so that the run may overwrite its own."""
    return {
        path: content if isinstance(content, bytes) else Path(shutil.copyfile(content, folder / str(index)))
        for index, (path, content) in enumerate(plan.items())
    }
