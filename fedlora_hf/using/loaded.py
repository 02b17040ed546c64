"""A finished run's base model with its tokenizer, and any of the run's adapters on it, one at a time."""
# SPDX-License-Identifier: Apache-2.0

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fedlora_hf.adapter.files import read_adapter
from fedlora_hf.adapter.slot import peft_quiet
from fedlora_hf.config import FederatedConfig
from fedlora_hf.errors import ConfigError
from fedlora_hf.loading import load_base, refused
from fedlora_hf.using.finished import Adapter, Finished

# PEFT's name of a task: transformers' class of its models.
CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_OUR_TASKS = {"CAUSAL_LM": "causal_lm", "SEQ_CLS": "sequence_classification"}
# Of a run's recorded options, those that say how its base and its data are read; the rest were for training.
_KEPT = (
    *("model_revision", "model_dtype", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant"),
    *("text_column", "label_column", "max_length"),
)


@dataclass(eq=False)
class Loaded:
    """The base, frozen; `tokenizer`: the run's own, where it kept one; `max_length` in tokens; args: what it was loaded
    by."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    args: FederatedConfig
    _adapted: PeftModel | None = None
    _count: int = 0

    @contextmanager
    def using(self, adapter: Adapter) -> Iterator[Any]:
        """The model with that adapter on it, for as long as the context lasts."""
        if adapter.folder is not None:
            self._put(adapter.folder)
            yield self._adapted
        elif self._adapted is None:
            yield self.model
        else:
            with self._adapted.disable_adapter():
                yield self._adapted

    def _put(self, folder: Path) -> None:
        """The adapter of `folder` in the place of the one before it. (PEFT's `unload` would leave a trained head.)"""
        self._count += 1
        name = f"used{self._count}"
        with _fitting(self.model, folder):
            if self._adapted is None:
                self._adapted = PeftModel.from_pretrained(self.model, str(folder), adapter_name=name)
            else:
                self._adapted.load_adapter(str(folder), name)
                self._adapted.set_adapter(name)
                self._adapted.delete_adapter(f"used{self._count - 1}")
        self._adapted.eval()

    def merged(self, adapter: Adapter) -> PreTrainedModel:
        """The base with the adapter added to its weights, by PEFT; the base alone is gone then."""
        if adapter.folder is None:
            return self.model
        self._put(adapter.folder)
        assert self._adapted is not None
        merged = self._adapted.merge_and_unload(safe_merge=True)
        self._adapted = None
        return cast(PreTrainedModel, merged)


@contextmanager
def _fitting(model: PreTrainedModel, folder: Path) -> Iterator[None]:
    """AdapterError for a folder that holds no plain LoRA in safetensors, ConfigError for one that does not fit."""
    read_adapter(folder)
    try:
        with peft_quiet():
            warnings.filterwarnings("error", ".*issing adapter keys")
            yield
    except (RuntimeError, ValueError, UserWarning) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ConfigError(
            f"model_name_or_path={model.name_or_path!r}: the adapter in {folder} does not fit it ({reason}); name the "
            "base that it was trained on"
        ) from None


def load(run: Finished, base: str | None = None, **changes: Any) -> Loaded:
    """The run's base model and tokenizer, on the device that is there.

    base: a folder or Hub id instead of the one that the run names. changes: options of FederatedConfig (use_cpu,
    model_dtype ...) over those of the run. Raises ConfigError for a base that is not there, or not known.
    """
    name = base_name(run, base)
    kept = {key: run.record.options[key] for key in _KEPT if run.record.options.get(key) is not None}
    revision = run.config.get("revision")
    if "model_revision" not in kept and revision and not os.path.isdir(name):
        kept["model_revision"] = revision
    if base is not None:
        kept.pop("model_revision", None)
    task = _OUR_TASKS.get(run.task_type, "causal_lm")
    options = {**kept, "task": task, "report_to": [], **changes}
    args = FederatedConfig(model_name_or_path=name, output_dir=str(run.folder), seed=run.record.seed, **options)
    if run.task_type in _OUR_TASKS:
        model, tokenizer, length = load_base(args, _classes(run) if run.task_type == "SEQ_CLS" else None)
    else:
        model, tokenizer, length = _other(run, args)
    kept_tokenizer = _own_tokenizer(run)
    if kept_tokenizer is not None:
        tokenizer = kept_tokenizer
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
    if not (args.load_in_4bit or args.load_in_8bit):
        model = cast(PreTrainedModel, model.to(args.device))  # type: ignore[arg-type]
    return Loaded(model.eval(), tokenizer, length, args)


def base_name(run: Finished, given: str | None = None) -> str:
    """The folder or Hub id of the base; ConfigError where it is not known, or is a folder that is no longer there."""
    name = given or run.record.model.get("name_or_path") or run.config.get("base_model_name_or_path")
    if not name:
        raise ConfigError(f"{run.folder}: does not say which base model it is of; name it by --model_name_or_path")
    name = str(name)
    local = name.startswith(("/", ".", "~")) or (given is None and bool(run.record.model.get("local")))
    if local and not os.path.isdir(name):
        raise ConfigError(
            f"model_name_or_path={name!r}: the base model is not there; say where it is by --model_name_or_path"
        )
    return name


def _classes(run: Finished) -> list[str]:
    """The classes of a classifier: as recorded, else their numbers, as many as the adapter's head has rows."""
    rows = _head_rows(run)
    labels = run.labels
    if labels is not None and rows in (None, len(labels)):
        return labels
    if rows is None:
        raise ConfigError(
            f"{run.folder}: neither run.json nor a head in the adapter says how many classes there are; such a run "
            "cannot be used from here, load it with PEFT"
        )
    return [str(number) for number in range(rows)]


def _head_rows(run: Finished) -> int | None:
    state, _ = read_adapter(run.folder)
    sizes = [tensor.shape[0] for tensor in (state.extras[name] for name in state.extras) if tensor.dim() == 2]
    return min(sizes) if sizes else None


def _other(run: Finished, args: FederatedConfig) -> tuple[Any, Any, int]:
    """The base of a task that runs of ours do not train, and so have no examples of."""
    if run.task_type not in CLASSES:
        raise ConfigError(f"task_type={run.task_type!r}: must be one of {', '.join(CLASSES)}; load it with PEFT")
    more: dict[str, Any] = {"num_labels": _head_rows(run)} if run.task_type == "TOKEN_CLS" else {}
    name = str(args.model_name_or_path)
    with refused(name), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind = getattr(transformers, CLASSES[run.task_type])
        model = kind.from_pretrained(name, dtype=args.model_dtype, revision=args.model_revision, **more)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=args.model_revision)
    return model, tokenizer, args.max_length


def _own_tokenizer(run: Finished) -> PreTrainedTokenizerBase | None:
    """The tokenizer that the run kept, with the chat template it used in it; None where it kept none."""
    if not (run.folder / "tokenizer_config.json").is_file():
        return None
    with refused(str(run.folder)):
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(str(run.folder)))
