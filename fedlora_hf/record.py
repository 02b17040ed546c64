"""The run record: what a run did, as plain JSON (run.json). The card and the report are made from it alone."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora_hf.errors import RecordError

SCHEMA_VERSION = 1
FILE_NAME = "run.json"
MAX_BYTES = 256 * 1024 * 1024
_PACKAGES = ("fedlora_hf", "torch", "transformers", "peft", "accelerate", "datasets", "huggingface_hub", "numpy")


@dataclass
class RunRecord:
    """Everything worth knowing of a run. Fields hold plain JSON values only; numbers that are not finite become null.

    kind: "train", "demo" or "aggregate". method: name of the aggregation method; method_info: its title, paper, what
        it averages. options: settings of the run that differ from their defaults, and the method's own options.
    model: {"name_or_path", "task", "dtype", "parameters"}. adapter: {"kind", "r", "alpha", "rslora", "target_modules",
        "parameters"}. data: {"dataset", "partition_by", "num_examples", "duplicates_removed", ...}.
    rounds: one entry a committed round: {"round", "stage", "cohort", "collaborative", "flagged", "quarantined",
        "weights", "train_loss", "update_norm", "evidence", "diagnosis", "n_iter", "converged", "bytes_up",
        "bytes_down", "seconds", "metrics"}; per-client values are {client id: value}.
    flagged: sorted ids of clients whose updates were sound but judged contaminated; quarantined: {id: reason}.
    clients: {id: {"collaborative", "weight", "num_examples", "evidence": {kind: {"score", "threshold"}}, "metrics":
        {"before" | "global" | "personalised" | "local": {metric: value}}}}.
    modules: {name: {"rank", "spectrum", "discarded_energy"}}.
    metrics: {"before": {"global": {...}}, "after": {"global": {...}, "personalised": {...}}}, means over the
        collaborative clients.
    diagnosis: what the last aggregation said of the whole cohort. similarity: {"ids", "cosine"} between the updates.
    """

    kind: str
    method: str
    seed: int
    method_info: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    created: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    flagged: list[str] = field(default_factory=list)
    quarantined: dict[str, str] = field(default_factory=dict)
    clients: dict[str, dict[str, Any]] = field(default_factory=dict)
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    diagnosis: dict[str, Any] = field(default_factory=dict)
    similarity: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """Canonical text: sorted keys, no NaN (null instead), ends with a newline."""
        return json.dumps(plain(dataclasses.asdict(self)), indent=1, sort_keys=True, allow_nan=False) + "\n"

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write run.json into `folder`, whole or not at all."""
        path = Path(folder) / FILE_NAME
        write_atomically(path, self.to_json().encode())
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "RunRecord":
        """Read and check run.json in `folder`; RecordError when it is missing or not such a record."""
        path = Path(folder) / FILE_NAME
        try:
            if path.stat().st_size > MAX_BYTES:
                raise RecordError(f"{path}: larger than {MAX_BYTES >> 20} MiB; it is not a run record")
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RecordError(
                f"{path}: no such file; give the output folder of fedlora train, demo or aggregate"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise RecordError(
                f"{path}: not readable as JSON ({type(error).__name__}); restore it or run again"
            ) from None
        return cls.from_dict(content, str(path))

    @classmethod
    def from_dict(cls, content: Any, where: str = FILE_NAME) -> "RunRecord":
        """A record from parsed JSON, its schema version and the types of its fields checked."""
        if not isinstance(content, dict):
            raise RecordError(f"{where}: holds a {type(content).__name__}; a run record is a JSON object; run again")
        version = content.get("schema_version")
        if version != SCHEMA_VERSION:
            raise RecordError(
                f"{where}: schema_version {version!r}; this version reads {SCHEMA_VERSION}; use a matching fedlora_hf"
            )
        known = {f.name: f for f in dataclasses.fields(cls)}
        missing = [name for name in ("kind", "method", "seed", "clients", "rounds") if name not in content]
        if missing:
            raise RecordError(f"{where}: key {missing[0]!r} is missing; restore the file or run again")
        record = cls(**{name: value for name, value in content.items() if name in known})
        blank = cls(kind="", method="", seed=0)
        for name in known:
            value, expected = getattr(record, name), type(getattr(blank, name))
            if not isinstance(value, expected) or isinstance(value, bool):
                raise RecordError(
                    f"{where}: {name} is a {type(value).__name__}, must be a {expected.__name__}; restore it"
                )
        for name in ("clients", "modules", "rounds"):
            entries = getattr(record, name)
            entries = entries.values() if isinstance(entries, dict) else entries
            if not all(isinstance(entry, dict) for entry in entries):
                raise RecordError(f"{where}: every entry of {name} must be an object; restore the file or run again")
        return record


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that move numbers."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def plain(value: Any) -> Any:
    """`value` as plain JSON: mappings, sequences, numbers; a float that is not finite becomes None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader, or a crash, sees the old file or the new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(draft, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
