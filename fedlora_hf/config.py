"""Every option of a federated run: `FederatedConfig`, a `transformers.TrainingArguments` with the federation's own."""
# SPDX-License-Identifier: Apache-2.0

import json
from dataclasses import MISSING, Field, dataclass, fields
from enum import Enum
from typing import Any

import numpy as np
from transformers import TrainingArguments

from fedlora_hf.aggregation.attacks import ATTACKS
from fedlora_hf.aggregation.device import checked_device
from fedlora_hf.aggregation.server_optimizer import server_rule, space_of
from fedlora_hf.aggregation.update_attacks import KINDS as UPDATE_KINDS
from fedlora_hf.errors import ConfigError
from fedlora_hf.launch.quantisation import check_quantisation
from fedlora_hf.launch.zero import plain_launch, zero_settings
from fedlora_hf.methods import method_named
from fedlora_hf.methods.settings import read_options
from fedlora_hf.numerics.server_step import Rule
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
from fedlora_hf.options.arguments import check_arguments, fill_in
from fedlora_hf.options.at_once import check_at_once
from fedlora_hf.options.facts import check_bounds, check_effects, facts_of
from fedlora_hf.options.needs import check_needs
from fedlora_hf.options.numbers import check_numbers
from fedlora_hf.options.spelling import suggestion
from fedlora_hf.privacy import Privacy
from fedlora_hf.util.counts import suspects_allowed
from fedlora_hf.util.rehearsal import DATA_KINDS, Contamination, read_contaminate

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
    activation checkpointing, report_to ...), or are refused when they are set: options/arguments.py says which, and
    docs/trainer.md. Other defaults: `learning_rate` 2e-4, `lr_scheduler_type` "constant" (a schedule runs over one
    client's steps of one round, and would start again in every round), `remove_unused_columns` False (the clients' own
    collator picks the columns).

    ```python
    from fedlora_hf import FederatedConfig

    args = FederatedConfig(output_dir="out", num_rounds=3, local_steps=20, lora_r=8, use_cpu=True)
    assert args.aggregation == "clair"
    assert args.changed()["local_steps"] == 20  # what run.json has of them
    ```
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "FederatedConfig":
        """ConfigError, with what was meant, for the name of an option that there is not."""
        known = cls.__dataclass_fields__
        for name in kwargs:
            if name not in known:
                said = suggestion(name, known)
                raise ConfigError(
                    f"{name}: is no option{'; ' + said if said else ''}; see the groups of fedlora train --help"
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for item in fields(self):
            if isinstance(value := getattr(self, item.name), np.generic):
                setattr(self, item.name, value.item())  # a number of numpy's is one, and a record holds Python's
        borrowed = [item.name for item in fields(TrainingArguments)]
        check_arguments(self, borrowed)
        check_numbers(self, borrowed)
        # Seen before TrainingArguments fills in what was left open.
        self._given = {item.name for item in fields(TrainingArguments) if self._sets(item)}
        fill_in(self)
        # One meaning under the old and the new name, whichever of them this transformers knows, and no warning.
        wanted = self.gradient_checkpointing if self.activation_checkpointing is None else self.activation_checkpointing
        self.gradient_checkpointing = self.activation_checkpointing = bool(wanted)
        self.zero = zero_settings(self)
        with plain_launch(self):
            super().__post_init__()
        # Processes train different clients, or count a step's tokens themselves (client.py).
        self.average_tokens_across_devices = False
        check_needs(self, self._given)
        self._normalise()
        check_quantisation(self)
        check_bounds(self)
        self._check_together()
        check_effects(self)
        Privacy.of(self)

    def _normalise(self) -> None:
        """One form for what may be written in several, and defaults that depend on other options."""
        self.clusters = "auto" if self.clusters == "auto" else "1" if str(self.clusters) == "1" else self.clusters
        self.target_modules, self.labels = _names(self.target_modules), _names(self.labels)
        if self.partition_by is None and self.client_column is not None:
            self.partition_by = "client"
        for name in ("dataset", "validation_dataset", "test_dataset"):
            setattr(self, name, _sources(name, getattr(self, name)))
        if self.pipeline == "fedlora_optimizer":
            self.adapter = "dirmag"
        if self.personal_steps is None:
            self.personal_steps = 20 if self.pipeline == "fedlora_optimizer" else 0
        self.aggregation_options = read_options(method_named(self.aggregation), self.aggregation_options)
        self.contaminate = _names(self.contaminate)
        if self.functional_judges is None:
            self.functional_judges = "auto"
        elif str(self.functional_judges).strip().isdecimal():
            self.functional_judges = int(self.functional_judges)  # a flag's text arrives as it is

    def _check_together(self) -> None:
        """ConfigError for values that do not go together."""
        self._check_server()
        self._check_limits()
        checked_device(self.aggregation_device)
        check_at_once(self)
        if self.scaffold:
            self._check_scaffold()
        if self.labels is not None and not 1 < len(self.labels) == len(set(self.labels)):
            raise ConfigError(f"labels={','.join(self.labels)}: must be two or more, all different; name every class")
        if self.round_lr_scheduler != "constant" and self.round_lr_min >= self.learning_rate:
            raise ConfigError(
                f"round_lr_min={self.round_lr_min}: must be below learning_rate={self.learning_rate}, from which the "
                "rate falls; leave it out for 0"
            )
        if not self.dataloader_num_workers:
            for name in ("dataloader_persistent_workers", "dataloader_prefetch_factor"):
                if getattr(self, name):
                    raise ConfigError(f"{name}={getattr(self, name)}: needs workers; pass --dataloader_num_workers")
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
        if self.dp_clip is not None and self.functional_judges not in (0, "auto"):
            raise ConfigError(
                f"functional_judges={self.functional_judges}: reads other clients' losses, which no noise covers; "
                "leave it out, or dp_clip"
            )
        method = method_named(self.aggregation)
        if self.weight_by == "uniform" and method.uniform:
            raise ConfigError(
                f"weight_by=uniform: has no effect with {method.name}, in which every client counts once; leave it out"
            )

    def _sets(self, item: "Field[Any]") -> bool:
        own, value = type(self).__dataclass_fields__[item.name], getattr(self, item.name)
        default = own.default if own.default_factory is MISSING else own.default_factory()
        return value != default and not any(value in same and default in same for same in _ALIKE)

    def _check_server(self) -> None:
        """The server's own data and optimizer, against what the method and the pipeline make of them."""
        method = method_named(self.aggregation)
        if self.server_dataset is not None and self.pipeline == "none" and not method.needs_server:
            raise ConfigError(
                f"server_dataset={self.server_dataset!r}: only the global stage of a pipeline and fltrust train on the "
                "server; pass --pipeline fedlora_optimizer or leave it out"
            )
        if self.server_rule is not None:
            space_of(method)

    def _check_scaffold(self) -> None:
        method = method_named(self.aggregation)
        if method.keeps or method.turns or (method.averages != "factors" and method.trains == ("A", "B")):
            raise ConfigError(
                f"scaffold with aggregation {method.name!r}: its clients' factors have no common coordinates from "
                "round to round; choose fedavg or ffa, or leave scaffold out"
            )
        if self.adapter != "lora":
            raise ConfigError(f"scaffold with adapter {self.adapter}: corrects plain LoRA's factors; leave out one")
        if self.dp_clip is not None:
            raise ConfigError("scaffold beside dp_clip: no noise covers a control variate; leave out one")
        if self.fp16:
            raise ConfigError("scaffold beside fp16: its gradients are scaled; pass --bf16 or leave it out")

    def _check_limits(self) -> None:
        """That the limits at which a run stops mean something beside the other options."""
        suspects_allowed(self.max_suspects, 1)
        for client, how in self.contaminated.items():
            if how.kind in ATTACKS and how.strength is not None:
                raise ConfigError(f"contaminate {client}={how}: {how.kind} has no strength; write {client}={how.kind}")
            if how.kind in ATTACKS and self.clusters != "1":
                raise ConfigError(
                    f"contaminate {client}={how}: its rehearsal knows one start for all; leave clusters out, or choose "
                    f"one of {', '.join(UPDATE_KINDS)}"
                )
            if how.kind in ATTACKS and set(method_named(self.aggregation).trained(1)) != {"A", "B"}:
                raise ConfigError(
                    f"contaminate {client}={how}: attacks both factors, aggregation {self.aggregation} freezes one; "
                    f"choose one of {', '.join(UPDATE_KINDS)}"
                )
        if self.dp_max_epsilon is None:
            return
        if self.dp_clip is None or not self.dp_noise_multiplier:
            raise ConfigError(
                f"dp_max_epsilon={self.dp_max_epsilon}: without noise nothing is guaranteed; pass --dp_clip and "
                "--dp_noise_multiplier"
            )
        if self.dp_seed is not None:
            raise ConfigError(f"dp_seed={self.dp_seed}: voids the guarantee that dp_max_epsilon bounds; leave out one")

    @property
    def judged(self) -> bool:
        """Whether others' losses may be looked at: by default where clair is told of them, all
        clients are one group and no noise must cover."""
        alone = self.clusters == "1" and self.dp_clip is None
        return self.functional_judges != 0 and self.aggregation == "clair" and alone

    @property
    def contaminated(self) -> dict[str, Contamination]:
        """{client: how it is contaminated on purpose}."""
        return read_contaminate(self.contaminate, {*DATA_KINDS, *UPDATE_KINDS, *ATTACKS})

    @property
    def server_rule(self) -> Rule | None:
        """The server's optimizer; None for none."""
        return server_rule(
            self.server_optimizer,
            self.server_learning_rate,
            self.server_momentum,
            self.server_beta2,
            self.server_tau,
        )

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
