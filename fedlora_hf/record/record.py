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

from fedlora_hf.errors import RecordError, one_line
from fedlora_hf.util.disk import read_json, write_atomically

SCHEMA_VERSION = 1
FILE_NAME = "run.json"
MAX_BYTES = 64 * 1024 * 1024
_PACKAGES = ("fedlora_hf", "torch", "transformers", "peft", "accelerate", "datasets", "huggingface_hub", "numpy")


@dataclass
class RunRecord:
    """Everything worth knowing of a run. Fields hold plain JSON values only; numbers that are not finite become null.

    kind: "train", "demo" or "aggregate". method: name of the aggregation method; method_info: its title, paper, what
        it averages. options: settings of the run that differ from their defaults, and the method's own options.
    model: {"name_or_path", "task", "dtype", "parameters"}. adapter: {"kind", "r", "alpha", "rslora", "target_modules",
        "parameters"}. data: {"dataset", "partition_by", "num_examples", "duplicates_removed", ...}.
    rounds: one entry a committed round: {"round", "stage", "cohort", "collaborative", "flagged", "quarantined",
        "weights", "influence", "suspicious", "claimed_weights", "outlier_claims" ({id: line} of those who claim far
        more than the others), "train_loss", "update_norm", "evidence", "diagnosis", "n_iter", "converged", "bytes_up",
        "bytes_down", "bytes_stored", "parts", "changed", "seconds", "metrics"}; per-client values are
        {client id: value}; of a round whose updates others judged also "effects" ({id: {"raised", "judges", "change"}}:
        whose loss they raise, of how many, by which share, the median) and "judging" {"judges": {id: examples},
        "weights", "cost"}; and "groups": {name: {"clients", "since", "within", "between"}} where clients have a
        global adapter by group; "1" is the first one, whose adapter is the run's. seconds: wall time by part, see
        `util.stopwatch.PARTS`; they add up to the round's. bytes_down: the round's result, sent back; bytes_stored: the
        parts a client trained itself.
    flagged: sorted ids of clients whose updates were sound but judged contaminated; quarantined: {id: reason}.
    suspicious: {id: {"kind", "of_line"}}: near the line of a flag in its last round, or beyond it in that round alone.
    clients: {id: {"collaborative", "weight", "influence" (what is left of it, 0 to 1), "claimed_weight",
        "outlier_claim" ("" or the line of the last round), "num_examples", "evidence": {kind: {"score", "threshold"}},
        "metrics": {"before" | "global" | "personalised" | "local": {metric: value}}}}; also "effect", the last
        round's of "effects", "contaminated": "kind:strength" of a client that the run contaminated on purpose, and
        "group": the group whose global adapter it starts from.
    modules: {name: {"rank", "spectrum", "discarded_energy"}}.
    metrics: {"before": {"global": {...}}, "after": {"global": {...}, "personalised": {...}}}, means over the
        collaborative clients.
    privacy: {"clip", "noise_multiplier", "delta", "rounds", "epsilon", "note", "neighbours", "adversary"}, of a run
        whose clients add noise; see privacy.account.
    sha256: {"adapter": of the global adapter's weights file, "data": of the tokenised examples, "base": of the base
        model's weights (see `adapter.base_fingerprint`)}, as far as known.
    scorings: {"taken", "reused"}: how often an adapter was scored on a client's split, and how often that was known
        already, since the run was last started.
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
    suspicious: dict[str, Any] = field(default_factory=dict)
    clients: dict[str, dict[str, Any]] = field(default_factory=dict)
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    diagnosis: dict[str, Any] = field(default_factory=dict)
    similarity: dict[str, Any] = field(default_factory=dict)
    privacy: dict[str, Any] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    scorings: dict[str, int] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """Canonical text: sorted keys, no NaN (null instead), ends with a newline."""
        return json.dumps(plain(vars(self)), indent=1, sort_keys=True, allow_nan=False) + "\n"

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
            content = read_json(path, MAX_BYTES)
        except FileNotFoundError:
            raise RecordError(
                f"{path}: no such file; give the output folder of fedlora train, demo or aggregate"
            ) from None
        except (OSError, ValueError) as error:
            raise RecordError(
                f"{path}: not readable as JSON ({one_line(error, 80)}); restore it or run again"
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


# What going on from a round reads of its entry, and of a client's.
_ROUND = {"cohort": list, "flagged": list, "quarantined": dict, "weights": dict, "train_loss": dict, "metrics": dict}
_ROUND |= {"evidence": dict, "combined_evidence": dict, "seconds": dict}
_LATER = {"claimed_weights": dict, "outlier_claims": dict, "groups": dict, "effects": dict}  # not always there
_CLIENT = {"collaborative": bool, "evidence": dict, "metrics": dict}


def check_complete(record: RunRecord, number: int, where: str) -> None:
    """RecordError unless a run can go on from `record` after round `number`: every round there, of the right types."""

    def refuse(what: str) -> RecordError:
        return RecordError(f"{where}: {what}; go on from another round, or run again")

    if [entry.get("round") for entry in record.rounds] != list(range(1, number + 1)):
        raise refuse(f"its record does not list the rounds 1 to {number}")
    for what, entries, fields in (
        ("round", ((entry["round"], entry) for entry in record.rounds), _ROUND | _LATER),
        ("client", record.clients.items(), _CLIENT),
    ):
        for name, entry in entries:
            for key, kind in fields.items():
                if not isinstance(entry.get(key, kind() if key in _LATER else None), kind):
                    raise refuse(f"{what} {name}: {key} is missing or no {kind.__name__}")
    for entry in record.rounds:
        named = [*entry["cohort"], *entry["flagged"], *entry["quarantined"], *entry["weights"], *entry["train_loss"]]
        if not set(map(str, named)) <= set(record.clients):
            raise refuse(f"round {entry['round']}: names clients that the run does not have")
        if not all(_is_group(name, facts, record.clients) for name, facts in (entry.get("groups") or {}).items()):
            raise refuse(f"round {entry['round']}: holds groups that are none")
        scores = [item for kind in ("evidence", "combined_evidence") for item in entry[kind].values()]
        values = [*entry["weights"].values(), *entry["train_loss"].values(), *entry["seconds"].values()]
        if not (all(map(_is_evidence, scores)) and all(map(_is_number, values))):
            raise refuse(f"round {entry['round']}: holds what is no number")
    if not all(isinstance(means, dict) for means in record.metrics.values()):
        raise refuse("its metrics are no mappings")
    for client, facts in record.clients.items():
        if not all(map(_is_metrics, facts["metrics"].values())):
            raise refuse(f"client {client}: metrics that are no numbers, or without a loss")


def _is_group(name: str, facts: object, clients: Mapping[str, Any]) -> bool:
    """A number: {"clients": some of the run's, "since": a round}."""
    if not (name.isascii() and name.isdecimal() and isinstance(facts, dict) and type(facts.get("since")) is int):
        return False
    members = facts.get("clients")
    return isinstance(members, list) and all(isinstance(member, str) and member in clients for member in members)


def _is_metrics(view: object) -> bool:
    return view == {} or (isinstance(view, dict) and "loss" in view and all(map(_is_number, view.values())))


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_evidence(kinds: object) -> bool:
    """{kind: {"score": number, "threshold": number}}"""
    return isinstance(kinds, dict) and all(
        isinstance(item, dict) and {"score", "threshold"} <= set(item) and all(map(_is_number, item.values()))
        for item in kinds.values()
    )


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
