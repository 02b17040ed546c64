"""Adapters and runs from the Hub: bounded before they are downloaded, never code, never outside their own folder."""
# SPDX-License-Identifier: Apache-2.0

import itertools
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
from huggingface_hub.constants import HF_HOME
from huggingface_hub.hf_api import RepoFile

from fedlora_hf.errors import AdapterError, FedLoraError, RecordError
from fedlora_hf.hub.plan import CONFIG, PICKLES, SIDE_CAR, WEIGHTS, check_weights
from fedlora_hf.hub.talk import REPO_ID, check_revision, hub_errors, with_retries
from fedlora_hf.hub.text import one_line
from fedlora_hf.record.record import FILE_NAME, MAX_BYTES, RunRecord
from fedlora_hf.util.names import fit_id, unfit_reason

MAX_WEIGHTS_BYTES = 8 * 1024**3
MAX_TEXT_BYTES = 4 * 1024**2
MAX_RUN_BYTES = 64 * 1024**3
MAX_FILES = 20_000
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SOURCE = re.compile(r"(?P<repo>[^@:\s]+)(?:@(?P<revision>[^:\s]+))?(?::(?P<subfolder>.+))?")
# What of a run's repository is worth having: the rest stays where it is.
_RUN_FILE = re.compile(
    rf"{re.escape(FILE_NAME)}"
    rf"|(?:(?:clients|groups)/[^/]+/)?(?:{re.escape(CONFIG)}|{re.escape(WEIGHTS)}|{re.escape(SIDE_CAR)})"
    r"|rounds/(?:[^/]+/)*[^/]+\.(?:json|safetensors)"
)


@dataclass(frozen=True)
class Source:
    """Where an adapter lies: a local folder, or `repo_id` at `revision`, in `subfolder` ("" is the root)."""

    folder: Path | None = None
    repo_id: str | None = None
    revision: str | None = None
    subfolder: str = ""

    @property
    def client_id(self) -> str:
        """A fit client id: the folder's name, or repository and sub-folder. Two sources may share one; check."""
        if self.folder is not None:
            return fit_id(self.folder.resolve().name)
        return fit_id(f"{self.repo_id}-{self.subfolder}" if self.subfolder else str(self.repo_id))

    @property
    def steps(self) -> tuple[str, ...]:
        """The path to it, step by step, for a name that tells it from others."""
        if self.folder is not None:
            return self.folder.resolve().parts[1:]
        return (f"{self.repo_id}-{self.subfolder}" if self.subfolder else str(self.repo_id),)

    def __str__(self) -> str:
        if self.folder is not None:
            return str(self.folder)
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo_id}{revision}{f':{self.subfolder}' if self.subfolder else ''}"


def parse_source(text: str | os.PathLike[str]) -> Source:
    """`user/repo[@revision][:subfolder]` or a local folder, as a Source; nothing is fetched.

    An existing folder wins over a repository of the same name; a leading "hub:" says that a repository is meant.
    Raises AdapterError for what is neither, and for sub-folders that would leave the repository.
    """
    given = os.fspath(text)
    name = given.removeprefix("hub:")
    if name == given and os.path.isdir(name):
        return Source(folder=Path(name))
    match = _SOURCE.fullmatch(name)
    if match is None or not REPO_ID.fullmatch(match["repo"]):
        raise AdapterError(
            f"{one_line(given, 120)!r}: neither an existing folder nor user/repo[@revision][:subfolder]; check the name"
        )
    revision = check_revision(match["revision"]) if match["revision"] else None
    subfolder = (match["subfolder"] or "").rstrip("/")
    return Source(repo_id=match["repo"], revision=revision, subfolder=_safe(subfolder) if subfolder else "")


def fetch_adapter(
    source: Source | str | os.PathLike[str],
    *,
    token: str | bool | None = None,
    max_bytes: int = MAX_WEIGHTS_BYTES,
    cache: str | os.PathLike[str] | None = None,
) -> Path:
    """A local folder holding the adapter of `source`: its config, safetensors weights and our side-car, nothing else.

    A local source is given back as it is. A repository's files are looked at before they are downloaded: weights of
    at most `max_bytes`, small configs, no pickles. cache: where folders are kept, by commit (default: HF_HOME).
    Raises AdapterError, one line.
    """
    source = source if isinstance(source, Source) else parse_source(source)
    if source.folder is not None:
        return source.folder
    repo_id, api = str(source.repo_id), HfApi(token=token)
    with hub_errors(AdapterError, str(source)):
        commit = _commit_of(api, source)
        target = _place(cache, repo_id, commit, f"adapter-{source.subfolder}")
        if target.is_dir():
            return target
        prefix = f"{source.subfolder}/" if source.subfolder else ""
        wanted = [prefix + name for name in (CONFIG, WEIGHTS, SIDE_CAR, *PICKLES)]
        found = with_retries(lambda: api.get_paths_info(repo_id, wanted, revision=commit), str(source))
        sizes = {entry.path.removeprefix(prefix): entry.size for entry in found if isinstance(entry, RepoFile)}
        chosen = _checked_adapter(str(source), sizes, max_bytes)
        _download(api, repo_id, commit, {prefix + name: size for name, size in chosen.items()}, target, prefix)
    return target


def fetch_run(
    repo_id: str,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    max_bytes: int = MAX_RUN_BYTES,
    cache: str | os.PathLike[str] | None = None,
) -> Path:
    """A local folder with the run pushed to `repo_id`: run.json, its adapters, and the state of rounds if there.

    At most `max_bytes` in MAX_FILES files, looked at before the download. Raises RecordError, one line.
    """
    source = parse_source(f"hub:{repo_id}" + (f"@{revision}" if revision else ""))
    api = HfApi(token=token)
    with hub_errors(RecordError, str(source)):
        commit = _commit_of(api, source)
        target = _place(cache, repo_id, commit, "run")
        if target.is_dir():
            return target
        tree = with_retries(lambda: _tree(api, repo_id, commit), str(source))
        sizes = {path: size for path, size in tree.items() if _RUN_FILE.fullmatch(path)}
        if FILE_NAME not in sizes:
            raise RecordError(f"{source}: holds no {FILE_NAME}; give a repository made by fedlora push")
        for path, size in sizes.items():
            _bounded(f"{source}: {_safe(path)}", size, _limit(path), RecordError)
        _bounded(f"{source}: the run", sum(sizes.values()), max_bytes, RecordError)
        _download(api, repo_id, commit, sizes, target)
    return target


def load_run(
    folder_or_repo_id: str | os.PathLike[str], revision: str | None = None, *, token: str | bool | None = None
) -> RunRecord:
    """The record of a run, from its output folder or from the Hub repository it was pushed to; RecordError, one line.

    From the Hub run.json alone is fetched, its size looked at before.
    """
    text = os.fspath(folder_or_repo_id)
    if os.path.isdir(text):
        return RunRecord.load(text)
    if not REPO_ID.fullmatch(text):
        raise RecordError(
            f"{one_line(text, 120)!r}: neither an existing folder nor a Hub repository id (user/name); check the name"
        )
    source, api = parse_source(f"hub:{text}" + (f"@{revision}" if revision else "")), HfApi(token=token)
    with hub_errors(RecordError, str(source)):
        commit = _commit_of(api, source)
        target = _place(None, text, commit, "record")
        if not target.is_dir():
            found = with_retries(lambda: api.get_paths_info(text, [FILE_NAME], revision=commit), str(source))
            sizes = {entry.path: int(entry.size) for entry in found if isinstance(entry, RepoFile)}
            if FILE_NAME not in sizes:
                raise RecordError(f"{source}: holds no {FILE_NAME}; give a repository made by fedlora push")
            _bounded(f"{source}: {FILE_NAME}", sizes[FILE_NAME], MAX_BYTES, RecordError)
            _download(api, text, commit, sizes, target)
    return RunRecord.load(target)


def _commit_of(api: HfApi, source: Source) -> str:
    """The commit that a source's revision names now; a commit's own id needs no asking."""
    if source.revision and _COMMIT.fullmatch(source.revision):
        return source.revision
    found = with_retries(lambda: api.repo_info(str(source.repo_id), revision=source.revision).sha, str(source))
    if not _COMMIT.fullmatch(str(found)):
        raise AdapterError(f"{source}: the Hub gives no commit id for it; try again later")
    return str(found)


def _checked_adapter(where: str, sizes: dict[str, int], max_bytes: int) -> dict[str, int]:
    """The files of an adapter to download, from what the repository holds."""
    if WEIGHTS not in sizes:
        pickled = [name for name in PICKLES if name in sizes]
        if pickled:
            raise AdapterError(f"{where}: only pickled weights ({pickled[0]}), which can run code; ask for safetensors")
        raise AdapterError(f"{where}: holds no {WEIGHTS}; check the sub-folder (clients/<id>) and the revision")
    if CONFIG not in sizes:
        raise AdapterError(f"{where}: holds no {CONFIG}; give a repository written by save_pretrained of an adapter")
    chosen = {name: sizes[name] for name in (CONFIG, WEIGHTS, SIDE_CAR) if name in sizes}
    for name, size in chosen.items():
        _bounded(f"{where}: {name}", size, min(max_bytes, _limit(name)), AdapterError)
    return chosen


def _limit(path: str) -> int:
    """The largest size that a file of this name may have."""
    if path.endswith(".safetensors"):
        return MAX_WEIGHTS_BYTES
    return MAX_BYTES if path == FILE_NAME or path.startswith("rounds/") else MAX_TEXT_BYTES


def _bounded(what: str, size: int, limit: int, kind: type[FedLoraError]) -> None:
    if size > limit:
        raise kind(f"{what} has {size / 1e6:.1f} MB, the limit is {limit / 1e6:.1f} MB; not downloaded")


def _tree(api: HfApi, repo_id: str, commit: str) -> dict[str, int]:
    """{path: bytes} of every file of the repository; RecordError beyond MAX_FILES entries."""
    entries = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    listed = list(itertools.islice(entries, MAX_FILES + 1))
    if len(listed) > MAX_FILES:
        raise RecordError(f"{repo_id}: holds more than {MAX_FILES} files and folders; nothing was downloaded")
    return {entry.path: entry.size for entry in listed if isinstance(entry, RepoFile)}


def _safe(path: str) -> str:
    """`path` itself when every step is a plain name below the repository's root; AdapterError otherwise."""
    for step in path.split("/"):
        if unfit_reason(step):
            raise AdapterError(f"{one_line(path, 120)!r}: leads outside the repository, or no plain path; correct it")
    return path


def _place(cache: str | os.PathLike[str] | None, repo_id: str, commit: str, part: str) -> Path:
    """The folder that one adapter (or run) of one commit has to itself."""
    root = Path(cache) if cache is not None else Path(HF_HOME) / "fedlora_hf"
    return root / repo_id.replace("/", "--") / commit / quote(part, safe="")


def _download(api: HfApi, repo_id: str, commit: str, sizes: dict[str, int], target: Path, prefix: str = "") -> None:
    """Download the files into `target`, which appears complete or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as scratch:
        draft = Path(scratch) / "done"
        for path, size in sizes.items():
            _safe(path)
            if path.endswith(".safetensors"):  # the listing may lie: what is about to be sent is asked for first
                where = hf_hub_url(repo_id, path, revision=commit, endpoint=api.endpoint)
                told = with_retries(partial(get_hf_file_metadata, where, token=api.token), repo_id)
                if told.size is not None and told.size != size:
                    raise AdapterError(f"{repo_id}: {path} has another size than the Hub said; not downloaded")
            cached = with_retries(partial(api.hf_hub_download, repo_id, path, revision=commit), repo_id)
            if os.stat(cached).st_size != size:
                raise AdapterError(f"{repo_id}: {path} has another size than the Hub said; not used")
            copy = draft / path.removeprefix(prefix)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(cached, copy)
            if copy.name.endswith(".safetensors"):
                check_weights(copy, f"{repo_id}: {path}")
        if FILE_NAME in sizes:
            RunRecord.load(draft)
        try:
            os.replace(draft, target)
        except OSError:
            # Another process was quicker: the same commit, so the same files.
            if not target.is_dir():
                raise
