"""What a run's options name, loaded: base model, tokenizer, clients' data, the server's data. Changes no option."""
# SPDX-License-Identifier: Apache-2.0

import copy
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import datasets
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fedlora_hf.config import FederatedConfig
from fedlora_hf.data.clients import client_names, deduplicate, told_names
from fedlora_hf.data.formats import load_examples
from fedlora_hf.data.labels import class_counts, head_labels, imbalance
from fedlora_hf.data.prepare import divided, rule_of
from fedlora_hf.data.say import say
from fedlora_hf.data.several import Loaded, load_several
from fedlora_hf.data.wording import is_tuned
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
    loaded = load_data(args)
    examples, rule = loaded.train, rule_of(args.partition_by, loaded.several)
    clients = divided(args, loaded, args.partition_by)
    labels = examples.features["label"].names if args.task == "sequence_classification" else None
    model, tokenizer, max_length = load_base(args, labels)
    facts: dict[str, dict[str, Any]] = {
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


def load_base(args: FederatedConfig, labels: Sequence[str] | None) -> Base:
    """The frozen base model and its tokenizer, from a folder or the Hub; no remote code is run.

    In 4 or 8 bits where the options say so. A head that the checkpoint lacks is drawn from the run's seed. A tokenizer
    without a padding token pads with its end-of-sequence token. labels: the classes in order, None for a causal LM.
    Raises ConfigError for a model that cannot be loaded, or a revision of a folder.
    """
    name = str(args.model_name_or_path)
    tokenizer = load_tokenizer(args)
    kind = AutoModelForCausalLM if labels is None else AutoModelForSequenceClassification
    more: dict[str, Any] = {"dtype": args.model_dtype, "revision": args.model_revision, **loading(args)}
    if labels is not None:
        more |= {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
        more["label2id"] = {label: number for number, label in enumerate(labels)}
    with _refused(name), torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(args.seed, "head"))
        model = kind.from_pretrained(name, **more)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    _check_vocabulary(model, tokenizer, name)
    longest = getattr(model.config, "max_position_embeddings", None)
    return Base(model, tokenizer, min(args.max_length, longest) if longest else args.max_length)


def load_tokenizer(args: FederatedConfig) -> PreTrainedTokenizerBase:
    """The base's tokenizer alone, as it is. ConfigError where there is none, or for a revision of a folder."""
    name = str(args.model_name_or_path)
    if args.model_revision is not None and os.path.isdir(name):
        raise ConfigError(
            f"model_revision={args.model_revision}: has no effect on a folder, which has one revision; leave it out"
        )
    with _refused(name):
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(name, revision=args.model_revision))


def longest_sequence(args: FederatedConfig) -> int | None:
    """The most tokens that the base takes, by its config; None where that does not say."""
    with _refused(str(args.model_name_or_path)):
        config = AutoConfig.from_pretrained(str(args.model_name_or_path), revision=args.model_revision)
    return getattr(config, "max_position_embeddings", None)


@contextmanager
def _refused(name: str) -> Iterator[None]:
    """What cannot be loaded is refused in one line."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError(f"model_name_or_path={name!r}: {reason}; give a folder or a Hub id of a model") from None


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """ConfigError for a tokenizer with a token that the base has no embedding for: a batch with it could not be run."""
    embeddings: Any = model.get_input_embeddings()
    rows = int(embeddings.weight.shape[0])
    if len(tokenizer) <= rows:
        return
    odd = [(number, token) for token, number in tokenizer.get_vocab().items() if number >= rows]
    if odd:
        number, token = min(odd)
        raise ConfigError(
            f"model_name_or_path={name!r}: its tokenizer has {token!r} (id {number}), and the model embeddings for "
            f"{rows} tokens only; pad with the EOS token if it is the padding, or resize the model's token embeddings"
        )
