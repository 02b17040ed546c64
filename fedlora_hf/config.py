"""Every option of a federated run: `FederatedConfig`, a `transformers.TrainingArguments` with the federation's own."""
# SPDX-License-Identifier: Apache-2.0

import json
from dataclasses import MISSING, Field, dataclass, fields
from enum import Enum
from typing import Any

from transformers import TrainingArguments

from fedlora_hf.errors import ConfigError
from fedlora_hf.launch.quantisation import check_quantisation
from fedlora_hf.launch.zero import plain_launch, zero_settings
from fedlora_hf.methods import method_named
from fedlora_hf.methods.settings import read_options
from fedlora_hf.options import (
    AdapterOptions,
    AggregationOptions,
    DataOptions,
    EvaluationOptions,
    HubOptions,
    ModelOptions,
    PipelineOptions,
    PrivacyOptions,
    RoundOptions,
)
from fedlora_hf.options.facts import check_bounds, check_effects, facts_of
from fedlora_hf.privacy import Privacy

# ---- what becomes of the options of TrainingArguments (those of our own say it in their field) -----------------------
# In every record, whether changed or not.
ALWAYS_TOLD = frozenset({"learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "weight_decay", "optim"})
ALWAYS_TOLD |= {"gradient_accumulation_steps", "max_grad_norm", "bf16", "fp16"}
# In none: places, secrets, what a launcher sets, and what the record keeps under another name.
NEVER_TOLD = frozenset({"output_dir", "logging_dir", "hub_token", "local_rank", "ddp_backend", "ddp_timeout"})
NEVER_TOLD |= {"seed", "gradient_checkpointing"}
# A resumed run may have other values of these: they show, store and place, or suit the machine, and move no number
# beyond what another machine moves.
RESUMABLE = frozenset({"report_to", "run_name", "project", "disable_tqdm", "push_to_hub", "deepspeed", "use_cpu"})
RESUMABLE |= {"per_device_eval_batch_size", "include_num_input_tokens_seen", "include_for_metrics", "debug"}
RESUMABLE |= {"prediction_loss_only", "batch_eval_metrics", "load_best_model_at_end", "metric_for_best_model"}
RESUMABLE |= {"greater_is_better", "skip_memory_metrics", "auto_find_batch_size", "accelerator_config"}
RESUMABLE |= {"gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", "do_train", "do_eval", "do_predict"}
RESUMABLE |= {"dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"}
RESUMABLE |= {"dataloader_prefetch_factor", "torch_empty_cache_steps", "resume_from_checkpoint"}
RESUMABLE_FAMILIES = ("logging_", "log_", "hub_", "save_", "eval_", "trackio_", "fsdp", "ddp_")
# Values that mean the same to TrainingArguments; a command line's parser writes another of them than a default has.
_ALIKE: tuple[tuple[Any, ...], ...] = ((None, "", [], {}), (False, "no"))


@dataclass
class FederatedConfig(  # type: ignore[misc]  # output_dir is never None here
    ModelOptions,
    DataOptions,
    RoundOptions,
    AdapterOptions,
    AggregationOptions,
    PrivacyOptions,
    PipelineOptions,
    EvaluationOptions,
    HubOptions,
    TrainingArguments,
):
    """Every option of a run: the groups of options/, which are the manual, and `transformers.TrainingArguments`.

    The latter keep their meaning for a client's local training (optimizer, weight decay, gradient accumulation, bf16,
    activation checkpointing, report_to ...). Differences: `learning_rate` 2e-4, `lr_scheduler_type` "constant" (a
    schedule runs over one client's steps of one round, and would start again in every round), `remove_unused_columns`
    False (the clients' own collator picks the columns), and `num_train_epochs` / `max_steps` are not used: say
    `local_epochs` or `local_steps`.
    """

    def __post_init__(self) -> None:
        # Seen before TrainingArguments fills in what was left open.
        self._given = {item.name for item in fields(TrainingArguments) if self._sets(item)}
        # One meaning under the old and the new name, whichever of them this transformers knows, and no warning.
        wanted = self.gradient_checkpointing if self.activation_checkpointing is None else self.activation_checkpointing
        self.gradient_checkpointing = self.activation_checkpointing = bool(wanted)
        self.zero = zero_settings(self)
        with plain_launch(self):
            super().__post_init__()
        # Processes train different clients, or count a step's tokens themselves (client.py).
        self.average_tokens_across_devices = False
        self._normalise()
        check_quantisation(self)
        check_bounds(self)
        self._check_together()
        check_effects(self)
        Privacy.of(self)

    def _normalise(self) -> None:
        """One form for what may be written in several, and defaults that depend on other options."""
        self.target_modules, self.labels = _names(self.target_modules), _names(self.labels)
        for name in ("dataset", "validation_dataset", "test_dataset"):
            setattr(self, name, _sources(name, getattr(self, name)))
        if self.pipeline == "fedlora_optimizer":
            self.adapter = "dirmag"
        if self.personal_steps is None:
            self.personal_steps = 20 if self.pipeline == "fedlora_optimizer" else 0
        self.aggregation_options = read_options(method_named(self.aggregation), self.aggregation_options)

    def _check_together(self) -> None:
        """ConfigError for values that do not go together."""
        if self.labels is not None and not 1 < len(self.labels) == len(set(self.labels)):
            raise ConfigError(f"labels={','.join(self.labels)}: must be two or more, all different; name every class")
        if self.local_steps is None and self.local_epochs <= 0:
            raise ConfigError(f"local_epochs={self.local_epochs}: must be above 0; pass local_steps or local_epochs")
        if self.validation_fraction + self.test_fraction >= 1:
            raise ConfigError(
                f"validation_fraction + test_fraction = {self.validation_fraction + self.test_fraction}: must stay "
                "below 1; leave something to train on"
            )
        for kind in ("validation", "test"):
            if getattr(self, f"{kind}_dataset") is not None and getattr(self, f"{kind}_split") is not None:
                raise ConfigError(f"{kind}_dataset and {kind}_split: both say what the {kind} data are; pass one")
        if self.partition_by in ("iid", "dirichlet") and self.dataset and self.num_clients is None:
            raise ConfigError(f"partition_by={self.partition_by} without num_clients: it needs one; pass --num_clients")
        if self.dp_clip is not None and self.functional_judges:
            raise ConfigError(
                f"functional_judges={self.functional_judges}: reads other clients' losses, which no noise covers; "
                "leave it out, or dp_clip"
            )
        method = method_named(self.aggregation)
        if self.weight_by == "uniform" and not method.weighted:
            raise ConfigError(
                f"weight_by=uniform: has no effect with {method.name}, in which every client counts once; leave it out"
            )

    def _sets(self, item: "Field[Any]") -> bool:
        own, value = type(self).__dataclass_fields__[item.name], getattr(self, item.name)
        default = own.default if own.default_factory is MISSING else own.default_factory()
        return value != default and not any(value in same and default in same for same in _ALIKE)

    @property
    def place_model_on_device(self) -> bool | None:
        """False where the base is too large for one: it gets there in parts, sharded."""
        return False if self.zero else super().place_model_on_device

    def changed(self) -> dict[str, Any]:
        """What the record tells: the federation's options, and those of TrainingArguments that differ from the default.

        A few of the latter are always told. Left out are places, secrets, and what the record keeps elsewhere.
        """
        borrowed = {item.name for item in fields(TrainingArguments)}
        own = {item.name for item in fields(FederatedConfig)} - borrowed
        told = own | ALWAYS_TOLD | self._given
        if "gradient_checkpointing" in told:
            told.add("activation_checkpointing")  # the same under its newer name
        told -= NEVER_TOLD
        values = {name: getattr(self, name) for name in sorted(told)}
        return {name: _value(value) for name, value in values.items() if value is not None}


def _names(given: list[str] | None) -> list[str] | None:
    """Names given as a list, or all in one text with commas between them."""
    return [part.strip() for part in given[0].split(",")] if isinstance(given, list) and len(given) == 1 else given


def _sources(name: str, given: Any) -> Any:
    """One source as it is, several as a list, a mapping of clients as one (a YAML file's arrives as JSON text)."""
    if isinstance(given, list | tuple):
        return given[0] if len(given) == 1 and isinstance(given[0], str) else list(given)
    if isinstance(given, str) and given.lstrip().startswith("{"):
        try:
            given = json.loads(given)
        except ValueError:
            raise ConfigError(f"{name}={given[:60]!r}: must be {{client: path}}; write it in a YAML file") from None
    if isinstance(given, dict) and not given:
        raise ConfigError(f"{name}={{}}: must name at least one client: path; leave it out for none")
    return given


def _value(value: Any) -> Any:
    """An option's value as the record can hold it: an enumeration's own, the contents of a settings object."""
    if isinstance(value, list | tuple):
        return [_value(item) for item in value]
    return value.value if isinstance(value, Enum) else value.to_dict() if hasattr(value, "to_dict") else value


def may_change(name: str) -> bool:
    """Whether a resumed run may have another value of this option: it moves no number of the rounds before."""
    if name in _OWN:
        return _OWN[name].resumable
    return name in RESUMABLE or name.startswith(RESUMABLE_FAMILIES)


_OWN = {item.name: facts for item in fields(FederatedConfig) if (facts := facts_of(item)) is not None}
# Options of TrainingArguments that only the server reads; those of our own say it in their field.
_SERVERS = {"push_to_hub", "report_to"}
SERVER_SIDE = frozenset(_SERVERS | {name for name, facts in _OWN.items() if facts.side == "server"})
