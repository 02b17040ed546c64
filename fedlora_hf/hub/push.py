"""The output folder of a run becomes a Hub repository: one commit, all of it or nothing."""
# SPDX-License-Identifier: Apache-2.0

import itertools
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.hf_api import RepoFile

from fedlora_hf.errors import ConfigError, RecordError
from fedlora_hf.hub.plan import make_plan, stale
from fedlora_hf.hub.talk import check_repo_id, check_revision, hub_errors, with_retries
from fedlora_hf.record import RunRecord

logger = logging.getLogger(__name__)
MAX_REMOTE_FILES = 100_000


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = True,
    with_clients: bool = False,
    token: str | bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    commit_message: str | None = None,
    attempts: int = 5,
) -> str:
    """Push the output folder of train, demo or aggregate to `repo_id`; returns the address of the commit.

    folder: holds run.json and the global adapter at its root. private: of a repository made by this call; an existing
    public one is refused unless private=False. with_clients: also the adapters of the collaborative clients; never
    those of flagged or quarantined ones, which are taken out of the repository if an earlier push had put them there.
    revision: branch to commit to (default main; made when missing). tag: name given to the commit; moved when it
    exists. attempts: tries of each step when the Hub is unreachable, busy, or others commit in between.
    A push that dies can be repeated: files already uploaded are not sent again, a commit that got through is not
    made twice. Raises ConfigError, RecordError or AdapterError, one line each; nothing is visible half-done.
    """
    repo_id = check_repo_id(repo_id)
    record = RunRecord.load(folder)
    plan = make_plan(Path(folder), record, repo_id, with_clients)
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
) -> str:
    """Commit `plan` as `push_folder` does."""
    branch = check_revision(revision or "main")
    if tag is not None:
        check_revision(tag)
    api = HfApi(token=token)
    with hub_errors(ConfigError, repo_id, revision):
        with_retries(lambda: _prepare(api, repo_id, private, branch), repo_id, attempts)
        oid, url = with_retries(lambda: _commit(api, repo_id, branch, plan, commit_message), repo_id, attempts)
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


def _commit(api: HfApi, repo_id: str, branch: str, plan: Mapping[str, Path | bytes], message: str) -> tuple[str, str]:
    """(commit id, address) of one commit on top of the branch's present head.

    Tried again as a whole after a conflict: the head is read anew. When an earlier try did get through and only its
    answer was lost, the client finds nothing left to change and gives the head itself.
    """
    head = api.repo_info(repo_id, revision=branch).sha
    if not head:
        raise RecordError(f"{repo_id}: the Hub gives no commit for {branch!r}; try again later")
    tree = itertools.islice(api.list_repo_tree(repo_id, recursive=True, revision=head), MAX_REMOTE_FILES)
    remote = [entry.path for entry in tree if isinstance(entry, RepoFile)]
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
        CommitOperationAdd(path_in_repo=path, path_or_fileobj=content) for path, content in plan.items()
    ]
    operations += [CommitOperationDelete(path_in_repo=path, is_folder=False) for path in stale(remote, plan)]
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
