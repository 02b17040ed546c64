"""Every option of a federated run: `FederatedConfig`, a `transformers.TrainingArguments` with the federation's own."""
# SPDX-License-Identifier: Apache-2.0

import json
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers import TrainingArguments

from fedlora_hf.aggregation import method_named, method_options
from fedlora_hf.errors import ConfigError


def _option(default: Any, text: str) -> Any:
    if isinstance(default, list | dict):
        return field(default_factory=lambda: default.copy(), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class FederatedConfig(TrainingArguments):
    """The manual of a run: `fedlora train --help` is made from these fields.

    All of `transformers.TrainingArguments` is here too and keeps its meaning for a client's local training
    (optimizer, weight decay, gradient accumulation, bf16, gradient checkpointing, report_to ...). Differences:
    `learning_rate` 2e-4, `lr_scheduler_type` "constant" (a schedule runs over one client's steps of one round, and
    would start again in every round), `remove_unused_columns` False (the clients' own collator picks the columns),
    and `num_train_epochs` / `max_steps` are not used: say `local_epochs` or `local_steps`.
    """

    # Defaults that differ from TrainingArguments.
    output_dir: str = _option("fedlora_run", "Where the adapters, the record, the card and the report go.")
    learning_rate: float = _option(2e-4, "Peak learning rate of a client's local optimizer.")
    lr_scheduler_type: str = _option("constant", "Schedule over one client's steps of one round.")
    remove_unused_columns: bool = _option(False, "Kept False: the clients' own collator picks the columns.")

    # Model.
    model_name_or_path: str | None = _option(None, "Base model: a local folder or a Hub id.")
    model_revision: str | None = _option(None, "Revision of the base model on the Hub.")
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto", "dtype the frozen base model is loaded in; the adapter stays in float32."
    )
    task: Literal["causal_lm", "sequence_classification"] = _option("causal_lm", "What is learnt.")

    # Data.
    dataset: str | None = _option(
        None, "A .jsonl/.json/.csv/.parquet file, a folder of Natural Instructions task files, or a Hub dataset id."
    )
    dataset_split: str | None = _option(None, "Split of a Hub dataset; default train.")
    text_column: str | None = _option(None, "Classification: the column of texts.")
    label_column: str | None = _option(None, "Classification: the column of labels.")
    client_column: str | None = _option(None, "Column that names the client, for partition_by client.")
    partition_by: Literal["category", "task", "dirichlet", "iid", "client"] = _option(
        "category", "How examples become clients: one category or task each, Dirichlet mixtures, iid, or a column."
    )
    num_clients: int | None = _option(None, "Number of clients, for partition_by iid and dirichlet.")
    dirichlet_alpha: float = _option(0.5, "Concentration of the Dirichlet mixtures: small is uneven, large is even.")
    max_examples_per_client: int | None = _option(None, "At most so many examples a client, drawn at random.")
    validation_fraction: float = _option(0.1, "Share of each client's examples it keeps to choose its adapter with.")
    test_fraction: float = _option(0.1, "Share of each client's examples that only evaluation sees.")
    max_length: int = _option(512, "Longest sequence, in tokens; a longer prompt loses its start.")

    # Rounds.
    num_rounds: int = _option(3, "Rounds of local training and aggregation.")
    clients_per_round: int | None = _option(None, "Clients drawn for each round; default all.")
    local_steps: int | None = _option(None, "Optimizer steps of a client in a round; overrides local_epochs.")
    local_epochs: float = _option(1.0, "Passes of a client over its own data in a round.")
    fedprox_mu: float = _option(
        0.0, "FedProx: weight of half the squared distance to the round's start, added to a client's loss."
    )
    server_min_clients: int = _option(1, "Fewest usable updates a round may be aggregated from.")
    resume_from: str | None = _option(
        None, "'last' or a round number of output_dir, or hub:user/repo@round-3: go on from that committed round."
    )
    keep_rounds: int = _option(2, "Committed rounds kept on disk (0: all); the updates still needed are always kept.")

    # Adapter.
    adapter: Literal["lora", "dirmag"] = _option("lora", "Plain LoRA, or direction/magnitude LoRA.")
    lora_r: int = _option(16, "Rank.")
    lora_alpha: int = _option(32, "The update is scaled by lora_alpha / lora_r.")
    lora_dropout: float = _option(0.0, "Dropout on the adapter's input.")
    use_rslora: bool = _option(False, "Scale by lora_alpha / sqrt(lora_r) instead.")
    target_modules: list[str] | None = _option(
        None, "Modules that get an adapter (name endings, or all-linear); default PEFT's choice for the architecture."
    )

    # Aggregation and personalisation.
    aggregation: str = _option("clair", "Aggregation method; fedlora train --help lists them.")
    # With `str` in the union a flag's text arrives as it is; `Any` would be called on it, and fail.
    aggregation_options: dict[str, Any] | str | None = _option(
        None, "The method's own options as JSON, e.g. '{\"rank\": 2}'."
    )
    functional_judges: int = _option(
        0,
        "clair: so many other clients' validation losses judge each update too (0: none). Costs two evaluations a "
        "judge and client in every round; weak by itself, see docs/results/validity_map.",
    )
    weight_by: Literal["examples", "uniform"] = _option("examples", "Weights of the clients in a mean.")
    personalise: Literal["select", "method"] = _option(
        "select",
        "Personal adapters: what the method refined (or the client's own last update), or the best on the client's "
        "validation split among that, the global adapter, its own update and mixes of the two.",
    )
    personal_steps: int | None = _option(
        None, "Further local steps of each client from its personal adapter, at the end; default 0, in a pipeline 20."
    )
    personal_learning_rate: float | None = _option(
        None, "Learning rate of the personal steps; default learning_rate, in a pipeline 5e-2."
    )

    # The direction/magnitude pipeline.
    pipeline: Literal["none", "fedlora_optimizer"] = _option(
        "none",
        "fedlora_optimizer: after the federated rounds, global rounds that train A's direction alone, then personal "
        "steps on B's magnitude alone (needs adapter dirmag, and sets it).",
    )
    global_rounds: int = _option(1, "Rounds of the global stage (0 leaves it out).")
    global_learning_rate: float | None = _option(None, "Learning rate of the global stage; default learning_rate.")
    server_dataset: str | None = _option(
        None, "Data of the server's own for the global stage; default: the clients' data, federated."
    )
    initial_adapter: str | None = _option(
        None, "Folder of an adapter to start from, so that a stage can be run alone or again."
    )

    # Evaluation.
    evaluate_rounds: bool = _option(False, "Evaluate the global adapter on every client after every round.")
    generation_examples: int = _option(4, "Test examples a client answers greedily for ROUGE-L (0: none).")
    max_new_tokens: int = _option(64, "Longest generated answer, in tokens.")
    hub_license: str | None = _option(
        None, "Licence of the adapters, for the model card (an identifier the Hub knows)."
    )
    hub_language: list[str] | None = _option(None, "Languages of the data, for the model card (en, de ...).")
    hub_with_clients: bool = _option(
        False, "Push the personal adapters too; they derive from the clients' private data."
    )
    max_eval_examples: int | None = _option(None, "At most so many test examples a client.")

    def __post_init__(self) -> None:
        super().__post_init__()
        # Processes train different clients: their batches have nothing to do with each other.
        self.average_tokens_across_devices = False
        if isinstance(self.target_modules, list) and len(self.target_modules) == 1:
            self.target_modules = [part.strip() for part in self.target_modules[0].split(",")]
        if self.pipeline == "fedlora_optimizer":
            self.adapter = "dirmag"
        if self.personal_steps is None:
            self.personal_steps = 20 if self.pipeline == "fedlora_optimizer" else 0
        if self.server_dataset is not None and self.pipeline == "none":
            raise ConfigError(
                f"server_dataset={self.server_dataset!r}: only the global stage of a pipeline trains on the server; "
                "pass --pipeline fedlora_optimizer or leave it out"
            )
        self.aggregation_options = _parsed(self.aggregation_options)
        method_options(method_named(self.aggregation), **self.aggregation_options)
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
    ("keep_rounds", 0, "0 keeps all rounds"),
    ("personal_steps", 0, "0 adds none"),
    ("functional_judges", 0, "0 judges on the updates alone"),
    ("global_rounds", 0, "0 leaves the global stage out"),
    ("fedprox_mu", 0, "0 leaves the term out"),
    ("generation_examples", 0, "0 generates nothing"),
    ("max_new_tokens", 1, "pass generation_examples=0 to generate nothing"),
)


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
