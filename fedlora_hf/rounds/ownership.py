"""Whether a run may write into a folder: what other hands have put there stays, and so does a run that is finished."""
# SPDX-License-Identifier: Apache-2.0

import os
import re
from collections.abc import Iterable
from pathlib import Path

from fedlora_hf.errors import ConfigError, RecordError
from fedlora_hf.record.record import FILE_NAME, RunRecord
from fedlora_hf.util.lock import LOCK

# What a run writes, and therefore replaces, in its output folder.
WRITTEN = ("adapter_config.json", "adapter_model.safetensors", "dirmag_config.json", "README.md", FILE_NAME)
REPLACED = ("clients", "groups", "rounds", "report")
_ROUND = re.compile(r"[1-9][0-9]{0,8}|\.open-[1-9][0-9]{0,8}|\..*\.(?:tmp|gone)")


def check_output(
    folder: str | os.PathLike[str],
    kind: str,
    inputs: Iterable[str | os.PathLike[str]] = (),
    beside: Iterable[str | os.PathLike[str]] = (),
) -> None:
    """ConfigError, before anything is changed, for a folder that a run must not write into.

    kind: of the run, as in its record ("train", "aggregate" ...). inputs: folders that it reads while it writes.
    beside: what it has read before it writes (base, data, an adapter to start from), which may lie near.
    Refused: a folder that is an input, lies in one or holds one; one that is one of `beside`, or would replace it; one
    that holds another kind of run; and one where no run of ours has been but files or folders have the names that it
    would replace.
    """
    folder = Path(folder)
    _check_overlap(folder, inputs)
    _check_beside(folder, beside)
    earlier = _record(folder)
    if earlier is not None:
        if earlier.kind != kind:
            raise _refused(folder, f"holds a run of kind {earlier.kind!r}, which {kind!r} would replace")
    elif not _is_ours(folder):
        found = [name for name in (*WRITTEN, *REPLACED) if os.path.lexists(folder / name)]
        if found:
            raise _refused(folder, f"holds {', '.join(found)} that no run has written, and would replace it")


def check_no_less(folder: str | os.PathLike[str], rounds: int) -> None:
    """ConfigError where a record of `rounds` rounds would replace one of more."""
    earlier = _record(Path(folder))
    if earlier is not None and len(earlier.rounds) > rounds:
        raise ConfigError(
            f"output_dir={str(folder)!r}: holds a run of {len(earlier.rounds)} rounds, and this one has {rounds}; call "
            "train() first, or pass another --output_dir"
        )


def _check_overlap(folder: Path, inputs: Iterable[str | os.PathLike[str]]) -> None:
    out = folder.resolve()
    for given in inputs:
        source = Path(given).resolve()
        if out == source or out in source.parents or source in out.parents:
            raise _refused(folder, f"overlaps with the input {str(given)!r}, which would be changed while it is read")


def _check_beside(folder: Path, beside: Iterable[str | os.PathLike[str]]) -> None:
    """A base with an adapter in its folder is taken for an adapter, and data with a record in theirs for other data."""
    out = folder.resolve()
    replaced = [out / name for name in REPLACED]
    for given in beside:
        source = Path(given).resolve()
        if source == out or any(place in (source, *source.parents) for place in replaced):
            raise _refused(folder, f"what the run reads is there ({str(given)!r}), and would be changed")


def _record(folder: Path) -> RunRecord | None:
    try:
        return RunRecord.load(folder)
    except RecordError:
        return None


def _is_ours(folder: Path) -> bool:
    """Whether a run has begun to write here: it has left its lock, or rounds that hold records."""
    if (folder / LOCK).is_file() and not (folder / LOCK).is_symlink():
        return True
    rounds = folder / "rounds"
    names = [path.name for path in rounds.iterdir()] if rounds.is_dir() and not rounds.is_symlink() else []
    if not rounds.is_dir() or not all(map(_ROUND.fullmatch, names)):
        return False
    # A run that could not even write its first record leaves an open round alone.
    return any((rounds / name / FILE_NAME).is_file() for name in names) or all(name[0] == "." for name in names)


def _refused(folder: Path, reason: str) -> ConfigError:
    return ConfigError(f"output_dir={str(folder)!r}: {reason}; pass another --output_dir")
