"""Every option of a federated run: `FederatedConfig`, a `transformers.TrainingArguments` with the federation's own."""
# SPDX-License-Identifier: Apache-2.0

import json
from dataclasses import dataclass, fields
from typing import Any

from transformers import TrainingArguments

from fedlora_hf.aggregation import method_named, method_options
from fedlora_hf.aggregation.server_optimizer import server_rule, space_of
from fedlora_hf.aggregation.update_attacks import KINDS as UPDATE_KINDS
from fedlora_hf.errors import ConfigError
from fedlora_hf.launch.quantisation import check_quantisation
from fedlora_hf.launch.zero import plain_launch, zero_settings
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
from fedlora_hf.privacy import Privacy
from fedlora_hf.util.counts import suspects_allowed
from fedlora_hf.util.rehearsal import DATA_KINDS, Contamination, read_contaminate


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
    """Every option of a run: the groups of options.py, which are the manual, and `transformers.TrainingArguments`.

    The latter keep their meaning for a client's local training (optimizer, weight decay, gradient accumulation, bf16,
    activation checkpointing, report_to ...). Differences: `learning_rate` 2e-4, `lr_scheduler_type` "constant" (a
    schedule runs over one client's steps of one round, and would start again in every round), `remove_unused_columns`
    False (the clients' own collator picks the columns), and `num_train_epochs` / `max_steps` are not used: say
    `local_epochs` or `local_steps`.
    """

    def __post_init__(self) -> None:
        # One meaning under the old and the new name, whichever of them this transformers knows, and no warning.
        wanted = self.gradient_checkpointing if self.activation_checkpointing is None else self.activation_checkpointing
        self.gradient_checkpointing = self.activation_checkpointing = bool(wanted)
        self.zero = zero_settings(self)
        with plain_launch(self):
            super().__post_init__()
        # Processes train different clients, or count a step's tokens themselves (client.py).
        self.average_tokens_across_devices = False
        check_quantisation(self)
        Privacy.of(self, self.functional_judges)
        self.target_modules, self.labels = _names(self.target_modules), _names(self.labels)
        if self.labels is not None and not 1 < len(self.labels) == len(set(self.labels)):
            raise ConfigError(f"labels={','.join(self.labels)}: must be two or more, all different; name every class")
        if self.pipeline == "fedlora_optimizer":
            self.adapter = "dirmag"
        if self.personal_steps is None:
            self.personal_steps = 20 if self.pipeline == "fedlora_optimizer" else 0
        self.aggregation_options = _parsed(self.aggregation_options)
        method_options(method_named(self.aggregation), **self.aggregation_options)
        self._check_server()
        self._check_limits()
        self._check_ditto()
        for name, low, remedy in _AT_LEAST:
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise ConfigError(f"{name}={value}: must be at least {low}; {remedy}")
        if self.local_steps is None and self.local_epochs <= 0:
            raise ConfigError(f"local_epochs={self.local_epochs}: must be above 0; pass local_steps or local_epochs")
        for name in ("validation_fraction", "test_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be in [0, 1); it is a share of the examples")
        if self.keep_rounds == 1:
            raise ConfigError(
                "keep_rounds=1: must be 0 (all) or at least 2; a round's personal adapters need its start"
            )
        if self.validation_fraction + self.test_fraction >= 1:
            raise ConfigError(
                f"validation_fraction + test_fraction = {self.validation_fraction + self.test_fraction}: must stay "
                "below 1; leave something to train on"
            )
        if self.partition_by in ("iid", "dirichlet") and self.dataset and self.num_clients is None:
            raise ConfigError(f"partition_by={self.partition_by} without num_clients: it needs one; pass --num_clients")

    def _check_server(self) -> None:
        """The server's own data and optimizer, against what the method and the pipeline make of them."""
        method = method_named(self.aggregation)
        if self.server_dataset is None and method.needs_server:
            raise ConfigError(
                f"aggregation={method.name!r} without server_dataset: it compares clients with an update trained "
                "on the server's own data; pass --server_dataset, or choose multikrum"
            )
        if self.server_dataset is not None and self.pipeline == "none" and not method.needs_server:
            raise ConfigError(
                f"server_dataset={self.server_dataset!r}: only the global stage of a pipeline and fltrust train on the "
                "server; pass --pipeline fedlora_optimizer or leave it out"
            )
        if self.server_rule is not None:
            space_of(method)

    def _check_ditto(self) -> None:
        if self.personal_proximal_mu and not self.personal_steps:
            raise ConfigError(
                f"personal_proximal_mu={self.personal_proximal_mu}: has no effect without personal_steps; pass "
                "--personal_steps"
            )

    def _check_limits(self) -> None:
        """That the limits at which a run stops mean something beside the other options."""
        suspects_allowed(self.max_suspects, 1)
        self.contaminate = _names(self.contaminate)
        read_contaminate(self.contaminate, {*DATA_KINDS, *UPDATE_KINDS})
        if self.dp_max_epsilon is None:
            return
        if not 0 < self.dp_max_epsilon < float("inf"):
            raise ConfigError(f"dp_max_epsilon={self.dp_max_epsilon}: must be a finite number above 0; 8 for instance")
        if self.dp_clip is None or not self.dp_noise_multiplier:
            raise ConfigError(
                f"dp_max_epsilon={self.dp_max_epsilon}: without noise nothing is guaranteed; pass --dp_clip and "
                "--dp_noise_multiplier"
            )
        if self.dp_seed is not None:
            raise ConfigError(f"dp_seed={self.dp_seed}: voids the guarantee that dp_max_epsilon bounds; leave out one")

    @property
    def contaminated(self) -> dict[str, Contamination]:
        """{client: how it is contaminated on purpose}."""
        return read_contaminate(self.contaminate, {*DATA_KINDS, *UPDATE_KINDS})

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
        """The federation's options, and those of training that differ from their default: what the record tells."""
        own = {f.name for f in fields(FederatedConfig)} - {f.name for f in fields(TrainingArguments)}
        own |= {"learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps"}
        own |= {"weight_decay", "max_grad_norm", "bf16", "fp16", "optim"}
        return {name: getattr(self, name) for name in sorted(own) if getattr(self, name) is not None}


_AT_LEAST = (
    ("num_rounds", 0, "0 evaluates the base model only"),
    ("num_clients", 1, "a federation has at least one client"),
    ("clients_per_round", 1, "leave it out for all clients"),
    ("local_steps", 1, "leave it out to train by local_epochs"),
    ("lora_r", 1, "pass a positive rank"),
    ("max_length", 8, "a prompt and an answer must fit"),
    ("max_examples_per_client", 1, "leave it out for all examples"),
    ("server_min_clients", 1, "a round needs an update"),
    ("client_timeout", 0, "leave it out for no limit"),
    ("keep_rounds", 0, "0 keeps all rounds"),
    ("personal_steps", 0, "0 adds none"),
    ("functional_judges", 0, "0 judges on the updates alone"),
    ("global_rounds", 0, "0 leaves the global stage out"),
    ("fedprox_mu", 0, "0 leaves the term out"),
    ("personal_proximal_mu", 0, "0 leaves the term out"),
    ("generation_examples", 0, "0 generates nothing"),
    ("max_new_tokens", 1, "pass generation_examples=0 to generate nothing"),
)


def _names(given: list[str] | None) -> list[str] | None:
    """Names given as a list, or all in one text with commas between them."""
    return [part.strip() for part in given[0].split(",")] if isinstance(given, list) and len(given) == 1 else given


def _parsed(options: dict[str, Any] | str | None) -> dict[str, Any]:
    if options is None or options == "":
        return {}
    if isinstance(options, dict):
        return options
    try:
        parsed = json.loads(options)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise ConfigError(f"aggregation_options={options!r}: must be a JSON object; e.g. '{{\"rank\": 2}}'")
    return parsed
