"""What a run's options name, loaded: base model, tokenizer, clients' data, the server's data. Changes no option."""
# SPDX-License-Identifier: Apache-2.0

import copy
import dataclasses
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

import datasets
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from fedlora_hf.adapter.base import Base, base_facts, load_base, load_tokenizer, longest_sequence, refused
from fedlora_hf.config import FederatedConfig
from fedlora_hf.data.clients import client_names, deduplicate, told_names
from fedlora_hf.data.formats import load_examples
from fedlora_hf.data.labels import class_counts, head_labels, imbalance
from fedlora_hf.data.prepare import divided, rule_of
from fedlora_hf.data.several import Loaded, load_several
from fedlora_hf.data.wording import is_tuned
from fedlora_hf.errors import ConfigError
from fedlora_hf.launch.processes import missing_processes
from fedlora_hf.record.record import RunRecord
from fedlora_hf.util.say import say


class Job(NamedTuple):
    """What a FederatedTrainer is made of: options as the base model allows them, base model, tokenizer, {client id:
    splits}, facts for the record, the server's own data."""

    args: FederatedConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    clients: dict[str, Any]
    facts: dict[str, Any]
    server: Any = None


def limited(args: FederatedConfig, max_length: int) -> FederatedConfig:
    """The options with that `max_length`; a copy, unless it is theirs already."""
    if args.max_length == max_length:
        return args
    changed = copy.copy(args)
    changed.max_length = max_length
    return changed


def prepare(args: FederatedConfig) -> Job:
    """Load what the options name: the data, divided into clients, and the base model.

    Raises ConfigError or DataError, one line each, for whatever of it is missing or does not fit.
    """
    if note := missing_processes(os.environ, args.world_size):
        print(note, file=sys.stderr)  # noqa: T201
    if not args.model_name_or_path or not args.dataset:
        name = "dataset" if args.model_name_or_path else "model_name_or_path"
        raise ConfigError(f"--{name} is missing: a run needs it; see fedlora train --help")
    loaded = load_data(args)
    examples, rule = loaded.train, rule_of(args.partition_by, loaded.several)
    clients = divided(args, loaded, args.partition_by)
    labels = examples.features["label"].names if args.task == "sequence_classification" else None
    model, tokenizer, max_length = load_base(args, labels)
    facts: dict[str, dict[str, Any]] = {
        "model": base_facts(args, model),
        "data": {
            "dataset": described(args.dataset),
            "local": not isinstance(args.dataset, str) or os.path.exists(args.dataset),
            "partition_by": rule,
            "language": args.hub_language,
            "num_clients": len(clients),
            "num_examples": len(examples),
            "duplicates_removed": deduplicate(examples)[1],
            "names": told_names(names_of(args, loaded, clients)),
        },
    }
    if labels is not None:
        facts["data"]["classes"] = counts = class_counts(examples)
        if note := imbalance(counts):
            say(note)
    return Job(limited(args, max_length), model, tokenizer, clients, facts, load_server_data(args, labels))


def args_of_run(record: RunRecord, folder: str | os.PathLike[str], changes: Mapping[str, Any]) -> FederatedConfig:
    """The options of a finished run in `folder`, as its record has them, with `changes`; set to go on from its end."""
    if record.kind != "train":
        raise ConfigError(f"{folder}: is of kind {record.kind!r}; only a run of fedlora train can be taken up again")
    known = {item.name for item in dataclasses.fields(FederatedConfig) if item.init}
    if odd := sorted(set(changes) - known):
        meant = get_close_matches(odd[0], known, 1)
        raise ConfigError(f"changes: {odd[0]!r} is no option of a run; did you mean {(meant or ['num_rounds'])[0]!r}?")
    recorded = {name: value for name, value in record.options.items() if name in known}
    options = {**recorded, "seed": record.seed, "resume_from": "last", **changes, "output_dir": os.fspath(folder)}
    return FederatedConfig(**options)


def facts_of_run(record: RunRecord) -> dict[str, Any]:
    """What only the caller of a run knew, as its record has it."""
    return {"model": dict(record.model), "data": dict(record.data)}


def prepare_again(args: FederatedConfig, record: RunRecord, clients: Any) -> Job:
    """As `prepare`, of a run that was; `clients`: its data where the options name none."""
    for name, given, argument in (
        ("model_name_or_path", args.model_name_or_path, "model"),
        ("dataset", clients or args.dataset, "client_datasets"),
    ):
        if given is None:
            raise ConfigError(f"{name}: the run's record names none; pass {argument}=")
    if clients is None:
        return prepare(args)
    labels = record.model.get("labels")
    model, tokenizer, max_length = load_base(args, labels if isinstance(labels, list) else None)
    server = load_server_data(args, labels)
    return Job(limited(args, max_length), model, tokenizer, clients, facts_of_run(record), server)


def described(dataset: Any) -> str:
    """What the record calls the data: the one source as it was given, of several how many there are."""
    return dataset if isinstance(dataset, str) else f"{len(dataset)} sources"


def names_of(args: FederatedConfig, loaded: Loaded, clients: Iterable[str]) -> dict[str, str]:
    """{client id: the name it has in the data}, of clients that are a column's values."""
    names = client_names(loaded.train, rule_of(args.partition_by, loaded.several))
    return {client: names[client] for client in clients if client in names}


def load_data(args: FederatedConfig) -> Loaded:
    """The examples of `args.dataset`, as the options say; ConfigError for a split of what has none."""
    for name in ("dataset_split", "validation_split", "test_split"):
        if getattr(args, name) is not None and isinstance(args.dataset, str) and os.path.isfile(args.dataset):
            raise ConfigError(
                f"{name}={getattr(args, name)}: has no effect on a file, which has no splits; leave it out"
            )
    return load_several(
        args.dataset,
        validation=args.validation_dataset,
        test=args.test_dataset,
        validation_split=args.validation_split,
        test_split=args.test_split,
        split=args.dataset_split,
        client_column=args.client_column,
        labels=args.labels,
        head=_head(args),
        **_reading(args),
    )


def load_server_data(args: FederatedConfig, labels: Sequence[str] | None) -> datasets.Dataset | None:
    """The server's own examples for the global stage, None without any; `labels`: the classes of all data, in order."""
    if args.server_dataset is None:
        return None
    return load_examples(
        args.server_dataset, labels=labels, **{**_reading(args), "text_column": None, "label_column": None}
    )


def _reading(args: FederatedConfig) -> dict[str, Any]:
    """What says how records are read; turns: instructions are kept as turns where a chat template may word them."""
    template = args.chat_template
    turns = (
        args.task == "causal_lm" and template != "none" and (template != "auto" or is_tuned(args.model_name_or_path))
    )
    return {"task": args.task, "text_column": args.text_column, "label_column": args.label_column, "turns": turns}


def _head(args: FederatedConfig) -> list[str] | None:
    """The classes that the base's head knows by name, None where it knows none, or is not there to be asked."""
    if args.task != "sequence_classification" or args.labels is not None or not args.model_name_or_path:
        return None
    try:
        return head_labels(AutoConfig.from_pretrained(args.model_name_or_path, revision=args.model_revision))
    except (OSError, ValueError, KeyError):  # said, in full, when the model is loaded
        return None


__all__ = [
    "Base",
    "Job",
    "args_of_run",
    "facts_of_run",
    "limited",
    "load_base",
    "load_data",
    "load_server_data",
    "load_tokenizer",
    "longest_sequence",
    "prepare",
    "prepare_again",
    "refused",
]
