"""Talking to the Hub: what is worth trying again, and its errors as one line each.

Messages are made from the status and the kind of error, never from the client's own text: that can hold signed
addresses, and no token may ever be shown.
"""
# SPDX-License-Identifier: Apache-2.0

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

# HTTPError, the base of every network error, is httpx's in version 1 and that of a copy of it in version 2.
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from fedlora_hf.errors import ConfigError, FedLoraError
from fedlora_hf.hub.text import one_line
from fedlora_hf.util.redaction import without_tokens

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
REVISION = re.compile(r"(?!.*(?:\.\.|//|@\{))[\w][\w./+-]{0,199}(?<![./])", re.ASCII)
CONFLICT = (409, 412)
_BUSY = (408, 425, 429)


def check_repo_id(repo_id: object) -> str:
    """`repo_id` itself when it can be one; ConfigError otherwise."""
    text = str(repo_id)
    if not REPO_ID.fullmatch(text) or ".." in text or "--" in text or text.endswith((".git", ".", "-")):
        raise ConfigError(f"repo_id {one_line(text, 120)!r}: must be user/name (A-Z a-z 0-9 . _ -); correct it")
    return text


def check_revision(revision: object) -> str:
    """`revision` itself when it can name a branch, a tag or a commit; ConfigError otherwise."""
    if not REVISION.fullmatch(str(revision)):
        raise ConfigError(f"revision {one_line(revision, 120)!r}: not a branch, a tag or a commit; correct it")
    return str(revision)


def status_of(error: BaseException) -> int | None:
    """HTTP status of an answer of the Hub; None when there was no answer."""
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def _root(error: BaseException) -> BaseException:
    """The network's own error under a RuntimeError (uploads) or a LocalEntryNotFoundError (downloads)."""
    while not isinstance(error, HTTPError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def is_conflict(error: BaseException) -> bool:
    """Whether somebody else's commit came in between."""
    return status_of(_root(error)) in CONFLICT


def is_transient(error: BaseException) -> bool:
    """Whether the same request may well succeed later: no answer, a server's fault, a busy server."""
    error = _root(error)
    if isinstance(error, OfflineModeIsEnabled):
        return False
    status = status_of(error)
    if status is not None:
        return status >= 500 or status in _BUSY
    return isinstance(error, HTTPError | ConnectionError | TimeoutError)


def with_retries(call: Callable[[], Result], what: str, attempts: int = 5, first_wait_s: float = 1.0) -> Result:
    """call(), tried again after transient errors and conflicts, waiting 1, 2, 4, 8 ... 30 s in between."""
    attempt = 0
    while True:
        attempt += 1
        try:
            return call()
        except Exception as error:
            if attempt >= attempts or not (is_transient(error) or is_conflict(error)):
                raise
            wait = min(first_wait_s * 2 ** (attempt - 1), 30.0)
            reason = status_of(_root(error)) or type(_root(error)).__name__
            logger.warning("%s: %s; trying again in %g s (%d of %d)", what, reason, wait, attempt, attempts - 1)
            time.sleep(wait)


@contextmanager
def hub_errors(kind: type[FedLoraError], repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Raise `kind` with one line for every error of the Hub's client inside the block."""
    try:
        yield
    except FedLoraError:
        raise
    except (HTTPError, HFValidationError, EntryNotFoundError, ValueError, RuntimeError, OSError) as error:
        raise kind(explain(error, repo_id, revision)) from None


def explain(error: BaseException, repo_id: str, revision: str | None = None) -> str:
    """One line: the repository, what is wrong, the remedy."""
    error = _root(error)
    where = f"{repo_id}@{revision}" if revision else repo_id
    status = status_of(error)
    if isinstance(error, OfflineModeIsEnabled):
        return f"{where}: the Hub is switched off by HF_HUB_OFFLINE; unset it, or give a local folder"
    if isinstance(error, LocalTokenNotFoundError):
        return f"{where}: needs a token and there is none; log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, HFValidationError):
        return f"{where}: not a valid repository id; write user/name"
    if isinstance(error, GatedRepoError):
        return f"{where}: access is gated; ask for it on the model's page, then log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return f"{where}: no such repository, or a private one; check the name, or log in with `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"{where}: the repository has no such branch, tag or commit; check the revision"
    if isinstance(error, EntryNotFoundError) and isinstance(error, HfHubHTTPError):
        return f"{where}: the repository has no such file or folder; check the sub-folder and the revision"
    if status in (401, 403):
        return f"{where}: refused ({status}); the token must have write access to it: see `hf auth whoami`"
    if status in CONFLICT:
        return f"{where}: others keep committing to it; nothing was changed, try again later"
    if status is not None:
        said = without_tokens(one_line(getattr(error, "server_message", "") or "no reason given", 160))
        return f"{where}: the Hub answered {status} ({said}); try again later, or check what was asked"
    if isinstance(error, HTTPError | ConnectionError | TimeoutError | EntryNotFoundError):
        return f"{where}: the Hub cannot be reached ({type(error).__name__}); check the network and HF_ENDPOINT"
    return f"{where}: {without_tokens(one_line(error, 160))}; check the files and try again"
