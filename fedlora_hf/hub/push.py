"""The output folder of a run becomes a Hub repository: one commit, all of it or nothing."""
# SPDX-License-Identifier: Apache-2.0

import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from fedlora_hf.errors import ConfigError, RecordError
from fedlora_hf.hub.plan import make_plan, stale
from fedlora_hf.hub.talk import check_repo_id, check_revision, hub_errors, with_retries
from fedlora_hf.record.record import RunRecord
from fedlora_hf.util.progress import Progress

logger = logging.getLogger(__name__)
MAX_REMOTE_FILES = 100_000
# Files that are sent together, between two steps of the bar: few requests, and a bar that moves.
BATCH_FILES, BATCH_BYTES = 32, 32 << 20


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = True,
    with_clients: bool = False,
    with_client_facts: bool = False,
    token: str | bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    commit_message: str | None = None,
    attempts: int = 5,
    progress: Progress | None = None,
) -> str:
    """Push the output folder of train, demo or aggregate to `repo_id`; returns the address of the commit.

    folder: holds run.json and the global adapter at its root. private: of a repository made by this call; an existing
    public one is refused unless private=False. with_clients: also the adapters of the collaborative clients; never
    those of flagged or quarantined ones, which are taken out of the repository if an earlier push had put them there.
    revision: branch to commit to (default main; made when missing). tag: name given to the commit; moved when it
    exists. with_client_facts: what the
    record says of each client (name, counts, losses, norms, evidence) and the report, whose figures show it; without it
    counts and means alone go. attempts: tries of each step when the Hub is unreachable, busy, or others commit in
    between. progress: shows the upload; default nothing.
    A push that dies can be repeated: files already uploaded are not sent again, a commit that got through is not
    made twice. Raises ConfigError, RecordError or AdapterError, one line each; nothing is visible half-done.
    """
    repo_id = check_repo_id(repo_id)
    record = RunRecord.load(folder)
    plan = make_plan(Path(folder), record, repo_id, with_clients, with_client_facts)
    warn_of_clients(plan, repo_id)
    message = commit_message or f"{record.method}, {len(record.rounds)} rounds"
    return push_plan(
        plan,
        repo_id,
        private=private,
        token=token,
        revision=revision,
        tag=tag,
        commit_message=message,
        attempts=attempts,
        progress=progress,
    )


def push_plan(
    plan: Mapping[str, Path | bytes],
    repo_id: str,
    *,
    private: bool,
    token: str | bool | None,
    revision: str | None,
    tag: str | None,
    commit_message: str,
    attempts: int = 5,
    progress: Progress | None = None,
) -> str:
    """Commit `plan` as `push_folder` does."""
    branch = check_revision(revision or "main")
    if tag is not None:
        check_revision(tag)
    api, progress = HfApi(token=token), progress or Progress(enabled=False)
    with hub_errors(ConfigError, repo_id, revision):
        with_retries(lambda: _prepare(api, repo_id, private, branch), repo_id, attempts)
        additions = _additions(plan)
        with progress.transfer(f"uploading to {repo_id}", len(additions), _size(additions)) as arrived, _hub_bars_off():
            for batch in _batches(additions):
                with_retries(partial(_upload, api, repo_id, branch, batch), repo_id, attempts)
                arrived(len(batch), _size(batch))
        # What the Hub said of these files holds for the first try alone; a second one asks again.
        tries = itertools.chain([additions], map(_additions, itertools.repeat(plan)))
        oid, url = with_retries(lambda: _commit(api, repo_id, branch, next(tries), commit_message), repo_id, attempts)
        if tag is not None:
            with_retries(lambda: _tag(api, repo_id, tag, oid), repo_id, attempts)
    return url


def warn_of_clients(plan: Mapping[str, object], repo_id: str) -> None:
    """Say plainly what is about to leave, when personal adapters are among it."""
    count = sum(path.startswith("clients/") and path.endswith(".safetensors") for path in plan)
    if count:
        logger.warning(
            "%s: pushing %d personal adapters. They derive from the clients' private data and can reveal parts of it; "
            "share them only with those clients' consent.",
            repo_id,
            count,
        )


def _prepare(api: HfApi, repo_id: str, private: bool, branch: str) -> None:
    """Make repository and branch when missing; refuse to publish what was meant to stay private."""
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.repo_info(repo_id).private:
        raise ConfigError(
            f"{repo_id}: is a public repository and the push is private; push with private=False, or make it private"
        )
    if branch != "main":
        api.create_branch(repo_id, branch=branch, exist_ok=True)


def _additions(plan: Mapping[str, Path | bytes]) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path_in_repo=path, path_or_fileobj=content) for path, content in plan.items()]


def _size(additions: Iterable[CommitOperationAdd]) -> int:
    return sum(addition.upload_info.size for addition in additions)


def _batches(additions: Iterable[CommitOperationAdd]) -> Iterator[list[CommitOperationAdd]]:
    """Runs of at most BATCH_FILES files and BATCH_BYTES bytes; a larger file is alone."""
    batch: list[CommitOperationAdd] = []
    for addition in additions:
        if batch and (len(batch) == BATCH_FILES or _size([*batch, addition]) > BATCH_BYTES):
            yield batch
            batch = []
        batch.append(addition)
    if batch:
        yield batch


def _upload(api: HfApi, repo_id: str, branch: str, batch: list[CommitOperationAdd]) -> None:
    """Send the files that the Hub wants ahead of the commit; small ones travel inside it."""
    api.preupload_lfs_files(repo_id, additions=batch, revision=branch, free_memory=False)


@contextmanager
def _hub_bars_off() -> Iterator[None]:
    """Without the Hub client's own bars, a whole set for every batch, which would run into ours."""
    if HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled():
        yield  # the user has decided already
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _commit(
    api: HfApi, repo_id: str, branch: str, additions: list[CommitOperationAdd], message: str
) -> tuple[str, str]:
    """(commit id, address) of one commit on top of the branch's present head.

    Tried again as a whole after a conflict: the head is read anew. When an earlier try did get through and only its
    answer was lost, the client finds nothing left to change and gives the head itself.
    """
    head = api.repo_info(repo_id, revision=branch).sha
    if not head:
        raise RecordError(f"{repo_id}: the Hub gives no commit for {branch!r}; try again later")
    tree = itertools.islice(api.list_repo_tree(repo_id, recursive=True, revision=head), MAX_REMOTE_FILES)
    remote = [entry.path for entry in tree if isinstance(entry, RepoFile)]
    gone = stale(remote, {addition.path_in_repo for addition in additions})
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
        *additions,
        *(CommitOperationDelete(path_in_repo=path, is_folder=False) for path in gone),
    ]
    with _hub_bars_off():
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=branch, parent_commit=head)
    return commit.oid, commit.commit_url


def _tag(api: HfApi, repo_id: str, tag: str, oid: str) -> None:
    """Let `tag` name the commit `oid`, taking it from another commit if need be."""
    present = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
    if present.get(tag) == oid:
        return
    if tag in present:
        api.delete_tag(repo_id, tag=tag)
    api.create_tag(repo_id, tag=tag, revision=oid)
