"""What of a run record may leave this machine: an allow-list, field by field. What is not named here stays."""
# SPDX-License-Identifier: Apache-2.0

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from fedlora_hf.hub.text import hub_id
from fedlora_hf.record.record import RunRecord
from fedlora_hf.util.redaction import without_tokens

# Fields that say nothing of a person, a path or a single client.
_WHOLE = ("kind", "method", "seed", "method_info", "created", "versions", "adapter", "metrics", "privacy")
# Of what the aggregation said of the cohort: numbers, and these texts. Lists there name clients.
_SAID = ("summary", "groups")
# Of a module: numbers of the aggregate alone.
_MODULE = ("rank", "spectrum", "discarded_energy")
# Of a round, beside counts and means over its clients.
_ROUND = ("round", "stage", "seconds", "n_iter", "converged", "parts", "changed")
_ROUND_MEANS = ("train_loss", "bytes_up", "bytes_down", "bytes_stored")
# Of the data and the model, beside their names where those are Hub ids.
_DATA = ("partition_by", "num_examples", "duplicates_removed", "language", "seed")
# A hash of the data would let whoever has a guess confirm it.
_SHA256 = ("adapter", "base")
_MODEL = ("task", "dtype", "parameters", "license", "num_bases")
# How examples were worded, in the words of data/wording.py: whoever asks the adapter has to know. A template's file has
# a name of somebody's own, which stays.
_WORDING = {
    "chat_template": ("none", "tokenizer"),
    "instructions": ("own wording", "chat template"),
    "loss": ("all assistant turns", "last assistant turn"),
    "example": ("Instruction:\n...\n\nAnswer:\n", "User:\n...\n\nAssistant:\n", "..."),
}
# Options whose value is a word of a fixed list. Texts of all others (paths, names, notes) stay; numbers and flags go.
_WORDS = (
    *("adapter", "aggregation", "pipeline", "task", "partition_by", "weight_by", "client_parallel", "personalise"),
    "bnb_4bit_quant_type",
    *("optim", "lr_scheduler_type", "model_dtype", "target_modules", "lora_init", "chat_template"),
    *("clusters", "server_optimizer", "round_lr_scheduler", "activation_dtype", "aggregation_options"),
)
_WORD = re.compile(r"[A-Za-z0-9][\w.-]{0,39}", re.ASCII)


def public_record(record: RunRecord, with_client_facts: bool = False) -> RunRecord:
    """The part of a record that a push sends.

    Without `with_client_facts` no client is named and nothing is said of a single one: not its name, number of
    examples, loss, norm, weight, evidence or reason; counts and means over clients take their place. With it, clients,
    rounds, modules and similarities go as they are. Never, either way: the command line, a path, the name of data or of
    a base model that is not on the Hub, an access token.
    """
    content: dict[str, Any] = json.loads(without_tokens(record.to_json()))
    sent = {name: content[name] for name in _WHOLE}
    sent |= {"schema_version": content["schema_version"], "options": _options(content["options"])}
    sent["model"] = _named(content["model"], "name_or_path", _MODEL)
    sent["data"] = _named(content["data"], "dataset", _DATA) | _wording(content["data"].get("wording"))
    sent["sha256"] = _only(content["sha256"], _SHA256)
    if with_client_facts:
        facts = ("clients", "rounds", "flagged", "quarantined", "modules", "diagnosis", "similarity")
        return RunRecord.from_dict(sent | {name: content[name] for name in facts})
    counts = {"clients": len(record.clients), "flagged": len(record.flagged), "quarantined": len(record.quarantined)}
    sent["data"] |= {"cohort": counts}
    sent["clients"] = {}
    sent["rounds"] = [_round(entry) for entry in content["rounds"]]
    sent["modules"] = {name: _only(entry, _MODULE) for name, entry in content["modules"].items()}
    sent["diagnosis"] = {
        name: value for name, value in content["diagnosis"].items() if _is_number(value) or name in _SAID
    }
    return RunRecord.from_dict(sent)


def public_config(text: str) -> bytes:
    """An adapter_config.json without the path of a base model that is not on the Hub: its last part stays."""
    config = json.loads(text)
    base = config.get("base_model_name_or_path")
    if isinstance(base, str) and base and hub_id(config, "base_model_name_or_path") is None:
        config["base_model_name_or_path"] = re.split(r"[/\\]", base.rstrip("/\\"))[-1]
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    def goes(name: str, value: Any) -> bool:
        if value is None or _is_number(value):
            return True
        if name not in _WORDS:
            return False
        if isinstance(value, Mapping):
            return all(_is_number(item) or (isinstance(item, str) and _WORD.fullmatch(item)) for item in value.values())
        words = value if isinstance(value, list) else [value]
        return all(isinstance(word, str) and _WORD.fullmatch(word) for word in words)

    return {name: value for name, value in options.items() if goes(name, value)}


def _named(entry: Mapping[str, Any], name: str, others: tuple[str, ...]) -> dict[str, Any]:
    """`others` of an entry, and its name where that is a Hub id; "local": true where it is not."""
    known = hub_id(entry, name)
    return _only(entry, others) | ({name: known} if known else {"local": True})


def _wording(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or not entry:
        return {}
    kept = {name: entry[name] for name, known in _WORDING.items() if entry.get(name) in known}
    return {"wording": kept if "chat_template" in kept else {**kept, "chat_template": "file"}}


def _round(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A round's own facts, and over its clients counts and means (under the key "mean", where tables look for them)."""
    sent = _only(entry, _ROUND)
    for name in ("cohort", "flagged", "quarantined"):
        if isinstance(entry.get(name), list | Mapping):
            sent[name] = len(entry[name])
    groups = entry.get("groups")
    if isinstance(groups, Mapping):  # how many they are, under the names of their adapters' folders
        told = {name: facts.get("clients") for name, facts in groups.items() if isinstance(facts, Mapping)}
        sent["groups"] = {name: {"members": len(who)} for name, who in told.items() if isinstance(who, list)}
    for name in _ROUND_MEANS:
        values = entry.get(name)
        found = [value for value in values.values() if _is_number(value)] if isinstance(values, Mapping) else []
        if found:
            sent[name] = {"mean": math.fsum(found) / len(found)}
    means = entry.get("metrics", {}).get("global") if isinstance(entry.get("metrics"), Mapping) else None
    if isinstance(means, Mapping) and all(map(_is_number, means.values())):
        sent["metrics"] = {"global": dict(means)}
    return sent


def _only(entry: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: entry[name] for name in names if name in entry} if isinstance(entry, Mapping) else {}


def _is_number(value: object) -> bool:
    """A number or a flag."""
    return isinstance(value, int | float)
