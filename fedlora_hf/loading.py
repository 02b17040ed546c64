"""What a run's options name, loaded: base model, tokenizer, clients' data, the server's data. Changes no option."""
# SPDX-License-Identifier: Apache-2.0

import copy
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import datasets
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fedlora_hf.config import FederatedConfig
from fedlora_hf.data.clients import deduplicate
from fedlora_hf.data.formats import load_examples
from fedlora_hf.data.prepare import divided
from fedlora_hf.errors import ConfigError
from fedlora_hf.launch.processes import missing_processes
from fedlora_hf.launch.quantisation import bits, loading
from fedlora_hf.trainer import FederatedTrainer
from fedlora_hf.util.seeding import derive_seed


class Base(NamedTuple):
    """A base model, its tokenizer, and the longest sequence in tokens: `max_length`, or the most the model takes."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int


class Job(NamedTuple):
    """What a FederatedTrainer is made of: options as the base model allows them, base model, tokenizer, {client id:
    splits}, facts for the record, the server's own data."""

    args: FederatedConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    clients: dict[str, Any]
    facts: dict[str, Any]
    server: Any = None

    def trainer(self, **kwargs: Any) -> FederatedTrainer:
        """The trainer of this job; further arguments are FederatedTrainer's."""
        return FederatedTrainer(
            self.model,
            self.args,
            self.clients,
            processing_class=self.tokenizer,
            server_dataset=self.server,
            record=self.facts,
            **kwargs,
        )


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
    examples = load_data(args)
    clients = divided(args, examples, args.partition_by)
    labels = examples.features["label"].names if args.task == "sequence_classification" else None
    model, tokenizer, max_length = load_base(args, labels)
    facts = {
        "model": {
            "name_or_path": args.model_name_or_path,
            "local": os.path.isdir(args.model_name_or_path),
            "task": args.task,
            "dtype": str(model.dtype).removeprefix("torch."),
            "bits": bits(args),
            "parameters": model.num_parameters(),
            "license": args.hub_license,
        },
        "data": {
            "dataset": args.dataset,
            "local": os.path.exists(args.dataset),
            "partition_by": args.partition_by,
            "language": args.hub_language,
            "num_clients": len(clients),
            "num_examples": len(examples),
            "duplicates_removed": deduplicate(examples)[1],
        },
    }
    return Job(limited(args, max_length), model, tokenizer, clients, facts, load_server_data(args, labels))


def load_data(args: FederatedConfig) -> datasets.Dataset:
    """The examples of `args.dataset`, as the options say; ConfigError for a split of what has none."""
    if args.dataset_split is not None and os.path.isfile(str(args.dataset)):
        raise ConfigError(
            f"dataset_split={args.dataset_split}: has no effect on a file, which has no splits; leave it out"
        )
    return load_examples(
        str(args.dataset),
        task=args.task,
        split=args.dataset_split,
        text_column=args.text_column,
        label_column=args.label_column,
        labels=args.labels,
        client_column=args.client_column,
    )


def load_server_data(args: FederatedConfig, labels: Sequence[str] | None) -> datasets.Dataset | None:
    """The server's own examples for the global stage, None without any; `labels`: the classes of all data, in order."""
    return None if args.server_dataset is None else load_examples(args.server_dataset, task=args.task, labels=labels)


def load_base(args: FederatedConfig, labels: Sequence[str] | None) -> Base:
    """The frozen base model and its tokenizer, from a folder or the Hub; no remote code is run.

    In 4 or 8 bits where the options say so. A head that the checkpoint lacks is drawn from the run's seed. A tokenizer
    without a padding token pads with its end-of-sequence token. labels: the classes in order, None for a causal LM.
    Raises ConfigError for a model that cannot be loaded, or a revision of a folder.
    """
    name = str(args.model_name_or_path)
    if args.model_revision is not None and os.path.isdir(name):
        raise ConfigError(
            f"model_revision={args.model_revision}: has no effect on a folder, which has one revision; leave it out"
        )
    kind = AutoModelForCausalLM if labels is None else AutoModelForSequenceClassification
    more: dict[str, Any] = {"dtype": args.model_dtype, "revision": args.model_revision, **loading(args)}
    if labels is not None:
        more |= {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
        more["label2id"] = {label: number for number, label in enumerate(labels)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=args.model_revision)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(args.seed, "head"))
            model = kind.from_pretrained(name, **more)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError(f"model_name_or_path={name!r}: {reason}; give a folder or a Hub id of a model") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    longest = getattr(model.config, "max_position_embeddings", None)
    return Base(model, tokenizer, min(args.max_length, longest) if longest else args.max_length)
