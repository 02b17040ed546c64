"""`fedlora train`: from flags or a YAML file to a finished run."""
# SPDX-License-Identifier: Apache-2.0

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import datasets
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.hf_argparser import string_to_bool

from fedlora_hf.commands.launch import missing_processes
from fedlora_hf.commands.manual import USAGE
from fedlora_hf.commands.summary import print_summary
from fedlora_hf.config import FederatedConfig
from fedlora_hf.data.clients import deduplicate
from fedlora_hf.data.formats import load_examples
from fedlora_hf.data.prepare import divided
from fedlora_hf.errors import ConfigError
from fedlora_hf.launch.quantisation import bits, loading
from fedlora_hf.trainer import FederatedTrainer
from fedlora_hf.util.disk import read_regular
from fedlora_hf.util.seeding import derive_seed

MAX_CONFIG_BYTES = 1024 * 1024


class FlagParser(HfArgumentParser):
    """The flags of FederatedConfig; a complaint is one line."""

    def __init__(self) -> None:
        super().__init__(cast(Any, FederatedConfig), prog="fedlora train", usage=USAGE, add_help=False)
        self.add_argument("--config", help="YAML file of flags; flags on the command line override it")
        self.add_argument("--help_all", action="help", help="this list; --help shows the federation's own, in groups")
        for action in self._actions:
            if action.type is string_to_bool and action.nargs is None:
                action.nargs, action.const = "?", True  # a bare flag is true, for `bool | None` too
            if action.dest == "report_to":
                action.nargs = "+"  # of a union with `str` HfArgumentParser would take one tracker only

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see fedlora train --help_all")


def parse(arguments: Sequence[str]) -> FederatedConfig:
    """The config from flags; `--config FILE` gives defaults from a YAML file, which flags override."""
    parser = FlagParser()
    known, _ = parser.parse_known_args(list(arguments))
    given = _from_yaml(known.config, parser) if known.config else []
    values = vars(parser.parse_args([*given, *arguments]))
    values.pop("config")
    try:
        return FederatedConfig(**values)
    except (ValueError, ImportError) as error:
        # TrainingArguments says what is wrong over several lines; ours are one line already.
        raise ConfigError(" ".join(str(error).split())[:400]) from None


def _from_yaml(path: str, parser: HfArgumentParser) -> list[str]:
    """The flags that a YAML file stands for, so that its values are checked as those of the command line are."""
    try:
        text = read_regular(Path(path), MAX_CONFIG_BYTES).decode("utf-8")
        # An alias stands for what was written elsewhere: a few lines of them unfold to fill the memory with.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError("aliases (*name) are not for flags")
        content = yaml.safe_load(text)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--config {path}: {str(error).splitlines()[0]}; give a YAML file of flags") from None
    flags = {action.dest for action in parser._actions}
    odd = sorted(map(str, set(content) - flags)) if isinstance(content, dict) else ["not a mapping"]
    if odd:
        raise ConfigError(f"--config {path}: {odd[0]!r} is no flag of fedlora train; see fedlora train --help_all")
    given: list[str] = []
    for name, value in content.items():
        texts = [json.dumps(v, default=str) if isinstance(v, dict | bool) else str(v) for v in _as_list(value)]
        given += [f"--{name}", *texts] if isinstance(value, list) else [f"--{name}={text}" for text in texts]
    return given


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


class Job(NamedTuple):
    """What a FederatedTrainer is made of: base model, tokenizer, {client id: splits}, facts for the record."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    clients: dict[str, Any]
    facts: dict[str, Any]
    server: Any = None

    def trainer(self, args: FederatedConfig, **kwargs: Any) -> FederatedTrainer:
        """The trainer of this job; further arguments are FederatedTrainer's."""
        return FederatedTrainer(
            self.model,
            args,
            self.clients,
            processing_class=self.tokenizer,
            server_dataset=self.server,
            record=self.facts,
            **kwargs,
        )


def train(arguments: Sequence[str]) -> FederatedTrainer:
    """Parse, load, train, write, push; the trainer, for whoever calls this from Python."""
    args = parse(arguments)
    job = prepare(args)
    trainer = job.trainer(args)
    trainer.train()
    finish(trainer)
    return trainer


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
    model, tokenizer = load_base(args, labels)
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
    return Job(model, tokenizer, clients, facts, load_server_data(args, labels))


def load_data(args: FederatedConfig) -> datasets.Dataset:
    """The examples of `args.dataset`, as the options say."""
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


def finish(trainer: FederatedTrainer) -> None:
    """Print the summary of a run that is done, and push it where `push_to_hub` says so."""
    if trainer.is_world_process_zero():
        print_summary(trainer.run.record, trainer.args.output_dir)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def load_base(args: FederatedConfig, labels: Sequence[str] | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen base model and its tokenizer, from a folder or the Hub; no remote code is run.

    In 4 or 8 bits where the options say so. A head that the checkpoint lacks is drawn from the run's seed. A tokenizer
    without a padding token pads with its end-of-sequence token. `max_length` is lowered to what the model can take.
    Raises ConfigError for a model that cannot be loaded.
    """
    name = str(args.model_name_or_path)
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
    if longest:
        args.max_length = min(args.max_length, longest)
    return model, tokenizer
