"""The base model of a run: loaded, checked to be one, and given its adapter."""
# SPDX-License-Identifier: Apache-2.0

import copy
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import PeftConfig, PeftModel, TaskType
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fedlora_hf.adapter.files import CONFIG
from fedlora_hf.adapter.slot import TASKS, check_config, own_adapter, peft_config, with_adapter
from fedlora_hf.config import FederatedConfig
from fedlora_hf.errors import ConfigError
from fedlora_hf.launch.quantisation import bits, loading
from fedlora_hf.launch.quiet import no_bars_in_logs
from fedlora_hf.util.say import say
from fedlora_hf.util.seeding import derive_seed


class Base(NamedTuple):
    """A base model, its tokenizer, and the longest sequence in tokens: `max_length`, or the most the model takes."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int


def load_base(args: FederatedConfig, labels: Sequence[str] | None) -> Base:
    """The frozen base model and its tokenizer, from a folder or the Hub; no remote code is run.

    In 4 or 8 bits where the options say so. A head that the checkpoint lacks is drawn from the run's seed. A tokenizer
    without a padding token pads with its end-of-sequence token. labels: the classes in order, None for a causal LM.
    Raises ConfigError for a model that cannot be loaded, or a revision of a folder.
    """
    name = str(args.model_name_or_path)
    check_no_adapter(name)
    tokenizer = load_tokenizer(args)
    kind = AutoModelForCausalLM if labels is None else AutoModelForSequenceClassification
    more: dict[str, Any] = {"dtype": args.model_dtype, "revision": args.model_revision, **loading(args)}
    if labels is not None:
        more |= {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
        more["label2id"] = {label: number for number, label in enumerate(labels)}
    with refused(name), torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(args.seed, "head"))
        model = kind.from_pretrained(name, **more, **_fresh_head(name, args, labels))
    _check_bare(model, name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    _check_vocabulary(model, tokenizer, name)
    longest = getattr(model.config, "max_position_embeddings", None) or args.max_length
    if args.max_length > longest and args.max_length != FederatedConfig.max_length:
        say(f"max_length={args.max_length}: {name} takes {longest} tokens at most, and gets no more")
    return Base(model, tokenizer, min(args.max_length, longest))


def load_tokenizer(args: FederatedConfig) -> PreTrainedTokenizerBase:
    """The base's tokenizer alone, as it is. ConfigError where there is none, or for a revision of a folder."""
    name = str(args.model_name_or_path)
    if args.model_revision is not None and os.path.isdir(name):
        raise ConfigError(
            f"model_revision={args.model_revision}: has no effect on a folder, which has one revision; leave it out"
        )
    with refused(name):
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(name, revision=args.model_revision))


def longest_sequence(args: FederatedConfig) -> int | None:
    """The most tokens that the base takes, by its config; None where that does not say."""
    name = str(args.model_name_or_path)
    with refused(name):
        config = AutoConfig.from_pretrained(name, revision=args.model_revision)
    return getattr(config, "max_position_embeddings", None)


@contextmanager
def refused(name: str) -> Iterator[None]:
    """What cannot be loaded is refused in one line; loading draws no bars into a log."""
    try:
        with no_bars_in_logs():
            yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError(f"model_name_or_path={name!r}: {reason}; give a folder or a Hub id of a model") from None


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """ConfigError for a tokenizer with a token that the base has no embedding for: a batch with it could not be run."""
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    if len(tokenizer) <= rows:
        return
    odd = [(number, token) for token, number in tokenizer.get_vocab().items() if number >= rows]
    if odd:
        number, token = min(odd)
        raise ConfigError(
            f"model_name_or_path={name!r}: its tokenizer has {token!r} (id {number}), and the model embeddings for "
            f"{rows} tokens only; pad with the EOS token if it is the padding, or resize the model's token embeddings"
        )


def base_by_name(name: str, args: FederatedConfig, clients: Mapping[str, Any]) -> tuple[FederatedConfig, Base]:
    """(the options with that name and its longest sequence, the base) for a trainer that was given a name for a model.

    clients: {client id: data}; of a classification they, or args.labels, say which classes there are.
    """
    if args.model_name_or_path not in (None, name):
        raise ConfigError(f"model={name!r}: args.model_name_or_path says {args.model_name_or_path!r}; say one of them")
    args = copy.copy(args)
    args.model_name_or_path = name
    base = load_base(args, None if args.task == "causal_lm" else _classes(args, clients))
    args.max_length = base.max_length
    return args, base


def _classes(args: FederatedConfig, clients: Mapping[str, Any]) -> list[str]:
    """The classes' names: those of args.labels, else those that the data declare."""
    for data in () if args.labels else clients.values():
        train = data.get("train") if isinstance(data, Mapping) else data
        names = getattr(getattr(train, "features", {}).get("label"), "names", None)
        if names:
            return list(names)
    if not args.labels:
        raise ConfigError("labels: the data name no classes; pass args.labels, or data with a ClassLabel column")
    return args.labels


def check_no_adapter(name: str) -> None:
    """ConfigError for an adapter's folder where a base is wanted: transformers would load both, under one name."""
    if os.path.isfile(os.path.join(name, CONFIG)):
        raise ConfigError(
            f"model_name_or_path={name!r}: is an adapter, not a base model; pass the base it was trained on as "
            "--model_name_or_path and this folder as --initial_adapter"
        )


def _check_bare(model: Any, name: str) -> None:
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError(
            f"model {name!r}: has an adapter of its own, which would be left out of the result; pass the bare base, "
            "and the adapter as --initial_adapter"
        )


def _fresh_head(name: str, args: FederatedConfig, labels: Sequence[str] | None) -> dict[str, Any]:
    """What makes transformers draw a head anew where the checkpoint's is of another number of classes; and a word."""
    if labels is None:
        return {}
    config = AutoConfig.from_pretrained(name, revision=args.model_revision)
    heads = [kind for kind in config.architectures or () if kind.endswith("ForSequenceClassification")]
    if not heads or config.num_labels == len(labels):
        return {}
    print(  # noqa: T201
        f"fedlora: {name}: its head has {config.num_labels} classes and the data have {len(labels)}; the head is drawn "
        "anew from the seed",
        file=sys.stderr,
    )
    return {"ignore_mismatched_sizes": True}


def base_facts(args: FederatedConfig, model: Any) -> dict[str, Any]:
    """What the run record says of the base model."""
    name = args.model_name_or_path or getattr(model, "name_or_path", "") or None
    return {
        "name_or_path": name,
        "local": name is not None and Path(name).is_dir(),
        "task": args.task,
        "dtype": str(model.dtype).removeprefix("torch."),
        "bits": bits(args),
        "parameters": model.num_parameters(),
        "license": args.hub_license,
    }


def adapted(model: nn.Module, config: PeftConfig | None, args: FederatedConfig) -> PeftModel:
    """The model with the adapter to train: a new one, or the one it has."""
    if not isinstance(model, PeftModel):
        _check_bare(model, str(getattr(model, "name_or_path", "")))
        if config is not None:
            check_config(config)
            config = _of_task(copy.copy(config), args)
        return with_adapter(model, config or peft_config(args), args.seed)
    if config is not None:
        raise ConfigError("peft_config: the model has an adapter already; pass one of the two")
    check_config(model.peft_config[own_adapter(model)], initialised=True)
    _of_task(model.peft_config[own_adapter(model)], args)
    return model


def _of_task(config: PeftConfig, args: FederatedConfig) -> PeftConfig:
    """The config with the run's task, which says by what class the adapter is loaded; ConfigError for another."""
    wanted = TASKS[args.task]
    if config.task_type not in (None, wanted):
        raise ConfigError(
            f"peft_config: task_type={TaskType(config.task_type).value}: the run's task is {args.task}, whose adapters "
            f"are {wanted.value}; leave it out, or pass the other task"
        )
    config.task_type = wanted
    return config


def checkpoint_activations(model: PeftModel, args: FederatedConfig) -> None:
    """Switch checkpointing on, as Trainer.train() would: a client's steps do not pass through it."""
    base: Any = model.get_base_model()
    if hasattr(base, "activation_checkpointing_enable"):  # transformers < 5.23 knows the older name alone
        base.activation_checkpointing_enable(args.activation_checkpointing_kwargs)
    else:
        base.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
