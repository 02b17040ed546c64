"""Every option of our own, in groups, with its default and its help: the manual of a run.

Imports nothing, so that `fedlora train --help` is instant. `FederatedConfig` (config.py) joins these groups to
`transformers.TrainingArguments` and checks the values. A new option is one line here.
"""
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass, field
from typing import Any, Literal


def option(default: Any, text: str, **more: Any) -> Any:
    """A dataclass field with its help; `more`: what else argparse shall know. Write {} as None: instances share it."""
    return field(default=default, metadata={"help": text, **more})


@dataclass
class ModelOptions:
    """Model"""

    model_name_or_path: str | None = option(None, "Base model: a local folder or a Hub id.")
    model_revision: str | None = option(None, "Revision of the base model on the Hub.")
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "dtype the frozen base model is loaded in; the adapter stays in float32."
    )
    load_in_4bit: bool = option(False, "Quantise the frozen base model to 4 bits (bitsandbytes).")
    load_in_8bit: bool = option(False, "Quantise the frozen base model to 8 bits (bitsandbytes).")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("nf4", "Kind of the 4-bit numbers.")
    use_bnb_nested_quant: bool = option(False, "4 bits: quantise the quantisation constants too.")
    task: Literal["causal_lm", "sequence_classification"] = option("causal_lm", "What is learnt.")


@dataclass
class DataOptions:
    """Data, and how it becomes clients"""

    dataset: str | None = option(
        None, "A .jsonl/.json/.csv/.parquet file, a folder of Natural Instructions task files, or a Hub dataset id."
    )
    dataset_split: str | None = option(None, "Split of a Hub dataset; default train.")
    text_column: str | None = option(None, "Classification: the column of texts.")
    label_column: str | None = option(None, "Classification: the column of labels.")
    labels: list[str] | None = option(None, "Classification: the classes, in order; default those that the data have.")
    client_column: str | None = option(None, "Column that names the client, for partition_by client.")
    partition_by: Literal["category", "task", "dirichlet", "iid", "client"] = option(
        "category", "How examples become clients: one category or task each, Dirichlet mixtures, iid, or a column."
    )
    num_clients: int | None = option(None, "Number of clients, for partition_by iid and dirichlet.")
    dirichlet_alpha: float = option(0.5, "Concentration of the Dirichlet mixtures: small is uneven, large is even.")
    max_examples_per_client: int | None = option(None, "At most so many examples a client, drawn at random.")
    contaminate: list[str] | None = option(
        None,
        "Rehearse an attack on your own data: CLIENT=KIND[:STRENGTH] ...; KIND spoils the client's training answers "
        "(random_outputs, constant, shuffled, shuffled_labels, random_labels; strength: a share of the examples) or "
        "its update (sign_flip, boost, gaussian, zero; strength: a factor).",
    )
    validation_fraction: float = option(0.1, "Share of each client's examples it keeps to choose its adapter with.")
    test_fraction: float = option(0.1, "Share of each client's examples that only evaluation sees.")
    max_length: int = option(512, "Longest sequence, in tokens; a longer prompt loses its start.")


@dataclass
class RoundOptions:
    """Rounds of local training"""

    output_dir: str = option("fedlora_run", "Where the adapters, the record, the card and the report go.")
    num_rounds: int = option(3, "Rounds of local training and aggregation.")
    clients_per_round: int | None = option(None, "Clients drawn for each round; default all.")
    local_steps: int | None = option(None, "Optimizer steps of a client in a round; overrides local_epochs.")
    local_epochs: float = option(1.0, "Passes of a client over its own data in a round.")
    learning_rate: float = option(2e-4, "Peak learning rate of a client's local optimizer.")
    lr_scheduler_type: str = option("constant", "Schedule over one client's steps of one round.")
    remove_unused_columns: bool = option(False, "Kept False: the clients' own collator picks the columns.")
    activation_checkpointing: bool | None = option(
        None,
        "Less memory for about a quarter more time. (Its older name, gradient_checkpointing, is understood too.)",
        nargs="?",
        const=True,
    )
    fedprox_mu: float = option(
        0.0, "FedProx: weight of half the squared distance to the round's start, added to a client's loss."
    )
    server_min_clients: int = option(1, "Fewest usable updates a round may be aggregated from.")
    max_suspects: str | None = option(
        None,
        "Stop, with nothing changed and exit code 3, at a round with more flagged or quarantined clients than this: a "
        "number, or a share such as 0.25. Default: no limit.",
    )
    client_timeout: float | None = option(
        None, "Seconds a client's local steps may take in a round; who takes longer is quarantined. Default: no limit."
    )
    client_parallel: Literal["clients", "data"] = option(
        "clients",
        "What several processes share out: the clients of a round, or the batches of each client (data-parallel: a "
        "step has per_device_train_batch_size x gradient_accumulation_steps x processes examples; needed for FSDP).",
    )
    resume_from: str | None = option(
        None, "'last' or a round number of output_dir, or hub:user/repo@round-3: go on from that committed round."
    )
    keep_rounds: int = option(2, "Committed rounds kept on disk (0: all); the updates still needed are always kept.")


@dataclass
class AdapterOptions:
    """Adapter"""

    adapter: Literal["lora", "dirmag"] = option("lora", "Plain LoRA, or direction/magnitude LoRA.")
    lora_r: int = option(16, "Rank.")
    lora_alpha: int = option(32, "The update is scaled by lora_alpha / lora_r.")
    lora_dropout: float = option(0.0, "Dropout on the adapter's input.")
    use_rslora: bool = option(False, "Scale by lora_alpha / sqrt(lora_r) instead.")
    target_modules: list[str] | None = option(
        None, "Modules that get an adapter (name endings, or all-linear); default PEFT's choice for the architecture."
    )
    initial_adapter: str | None = option(
        None, "Folder of an adapter to start from, so that a stage can be run alone or again."
    )


@dataclass
class AggregationOptions:
    """Aggregation and personal adapters"""

    aggregation: str = option("clair", "Aggregation method, one of those listed below.")
    # With `str` in the union a flag's text arrives as it is; `Any` would be called on it, and fail.
    aggregation_options: dict[str, Any] | str | None = option(
        None, "The method's own options as JSON, e.g. '{\"rank\": 2}'."
    )
    functional_judges: int = option(
        0,
        "clair: so many other clients' validation losses judge each update too (0: none). Costs an evaluation a judge "
        "and client in every round; holds while most judges are honest, so the more the better. See docs/clair.md.",
    )
    server_optimizer: Literal["none", "avgm", "adam", "yogi", "adagrad"] = option(
        "none", "Step of the server around an averaging method: momentum, or adaptive. See docs/choosing.md."
    )
    server_learning_rate: float | None = option(None, "Of the server's step; default 1 for avgm, 1e-3 for the others.")
    server_momentum: float = option(0.9, "Of the server's step: avgm's momentum, beta_1 of the others.")
    server_beta2: float = option(0.99, "Of the server's step: decay of adam's and yogi's second moment.")
    server_tau: float = option(1e-3, "Of the server's step: adaptivity of adam, yogi and adagrad.")
    weight_by: Literal["examples", "uniform"] = option("examples", "Weights of the clients in a mean.")
    personalise: Literal["select", "method"] = option(
        "select",
        "Personal adapters: what the method refined (or the client's own last update), or the best on the client's "
        "validation split among that, the global adapter, its own update and mixes of the two.",
    )
    personal_steps: int | None = option(
        None, "Further local steps of each client from its personal adapter, at the end; default 0, in a pipeline 20."
    )
    personal_proximal_mu: float = option(
        0.0,
        "Ditto: the personal steps start from the global adapter, and half the squared distance to it, times this, is "
        "added to their loss. 0: they start from the adapter that was chosen, and nothing holds them.",
    )
    personal_learning_rate: float | None = option(
        None, "Learning rate of the personal steps; default learning_rate, in a pipeline 5e-2."
    )


@dataclass
class PrivacyOptions:
    """Differential privacy of what leaves a client (docs/privacy.md)"""

    dp_clip: float | None = option(
        None, "Largest L2 norm of a client's change of the trained factors in a round; longer ones are scaled down."
    )
    dp_noise_multiplier: float | None = option(
        None, "Standard deviation of the noise that each client adds to every entry, in units of dp_clip; default 0."
    )
    dp_delta: float | None = option(None, "The delta that epsilon is told for; default 1e-5.")
    dp_max_epsilon: float | None = option(
        None, "Stop before the round that would take a client past this epsilon (exit code 3, nothing changed)."
    )
    dp_seed: int | None = option(
        None, "Draw the noise from this instead of a secret: for experiments; it voids the guarantee."
    )


@dataclass
class PipelineOptions:
    """The direction/magnitude pipeline"""

    pipeline: Literal["none", "fedlora_optimizer"] = option(
        "none",
        "fedlora_optimizer: after the federated rounds, global rounds that train A's direction alone, then personal "
        "steps on B's magnitude alone (needs adapter dirmag, and sets it).",
    )
    global_rounds: int = option(1, "Rounds of the global stage (0 leaves it out).")
    global_learning_rate: float | None = option(None, "Learning rate of the global stage; default learning_rate.")
    server_dataset: str | None = option(
        None,
        "Data of the server's own, for the global stage (default there: the clients' data, federated) or for fltrust.",
    )


@dataclass
class EvaluationOptions:
    """Evaluation"""

    evaluate_rounds: bool = option(False, "Evaluate the global adapter on every client after every round.")
    generation_examples: int = option(4, "Test examples a client answers greedily for ROUGE-L (0: none).")
    max_new_tokens: int = option(64, "Longest generated answer, in tokens.")
    max_eval_examples: int | None = option(None, "At most so many test examples a client.")


@dataclass
class HubOptions:
    """The Hub"""

    hub_license: str | None = option(None, "Licence of the adapters, for the model card (an identifier the Hub knows).")
    hub_language: list[str] | None = option(None, "Languages of the data, for the model card (en, de ...).")
    hub_with_clients: bool = option(
        False, "Push the personal adapters too; they derive from the clients' private data."
    )


GROUPS = (
    ModelOptions,
    DataOptions,
    RoundOptions,
    AdapterOptions,
    AggregationOptions,
    PrivacyOptions,
    PipelineOptions,
    EvaluationOptions,
    HubOptions,
)
