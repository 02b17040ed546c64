"""Options of the model, the data, the rounds of local training and the adapter."""
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass
from typing import Any, Literal

from fedlora_hf.options.facts import GIVEN, Bound, at_least, not_negative, option, positive, share


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
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option(
        "nf4", "Kind of the 4-bit numbers.", needs={"load_in_4bit": GIVEN}
    )
    use_bnb_nested_quant: bool = option(
        False, "4 bits: quantise the quantisation constants too.", needs={"load_in_4bit": GIVEN}
    )
    task: Literal["causal_lm", "sequence_classification"] = option(
        "causal_lm", "Task: causal language modelling or sequence classification."
    )


@dataclass
class DataOptions:
    """Data, and how it becomes clients"""

    # HfArgumentParser takes the second of a union for the type of a word on the command line.
    dataset: dict[str, Any] | str | list[str] | None = option(
        None,
        "A .jsonl/.json/.csv/.tsv/.parquet file (.gz too), a folder of Natural Instructions task files, or a Hub "
        "dataset id, user/name[:configuration]. Several, a folder of files or of folders, a quoted glob, or in YAML "
        "{client: path}: each is a client, named by its path.",
    )
    dataset_split: str | None = option(None, "Split of a Hub dataset; default train.")
    validation_dataset: dict[str, Any] | str | list[str] | None = option(
        None, "Fixed validation data, in the place of validation_fraction; its clients' names are the dataset's."
    )
    test_dataset: dict[str, Any] | str | list[str] | None = option(
        None, "Fixed test data, in the place of test_fraction."
    )
    validation_split: str | None = option(None, "Split of the dataset that is for validation.")
    test_split: str | None = option(None, "Split of the dataset that is for testing.")
    chat_template: str = option(
        "auto",
        "auto: chats in the tokenizer's own template where it has one, instructions too where the base's name or card "
        "says instruct; none: in our own words; or a file of Jinja, for both.",
    )
    assistant_only_loss: bool = option(
        False, "Chats: learn every turn of the assistant's, not the last alone.", needs={"task": ("causal_lm",)}
    )
    packing: bool = option(
        False,
        "Train on several short examples in one sequence of max_length, blind to each other (local_steps and batch "
        "sizes count such sequences then).",
        needs={"task": ("causal_lm",)},
    )
    text_column: str | None = option(None, "Column of the texts to classify, or of the prompts.")
    label_column: str | None = option(None, "Column of the classes, or of the completions.")
    labels: list[str] | None = option(
        None,
        "Classification: the classes, in order; default those that the data have.",
        needs={"task": ("sequence_classification",)},
    )
    client_column: str | None = option(
        None,
        "Column that names the client, for partition_by client, which it is the default with.",
        needs={"partition_by": ("client",)},
    )
    partition_by: Literal["category", "task", "dirichlet", "iid", "client"] | None = option(
        None,
        "How examples become clients: one category or task each, Dirichlet mixtures, iid, or a column. Default: of "
        "several sources each is a client, of one each category.",
    )
    num_clients: int | None = option(
        None,
        "Number of clients, for partition_by iid and dirichlet.",
        bound=at_least(1, "a federation has at least one client"),
        needs={"partition_by": ("iid", "dirichlet")},
    )
    dirichlet_alpha: float = option(
        0.5,
        "Concentration of the Dirichlet mixtures: small is uneven, large is even.",
        bound=positive("0.5 is uneven, 100 nearly even"),
        needs={"partition_by": ("dirichlet",)},
    )
    max_examples_per_client: int | None = option(
        None, "At most so many examples a client, drawn at random.", bound=at_least(1, "leave it out for all examples")
    )
    contaminate: list[str] | None = option(
        None,
        "Rehearse an attack on your own data: CLIENT=KIND[:STRENGTH] ...; KIND spoils the client's training answers "
        "(random_outputs, constant, shuffled, shuffled_labels, random_labels; strength: a share of the examples) or "
        "its update (sign_flip, boost, gaussian, zero; strength: a factor), or is an attack by clients who know all "
        "other updates (min-max, near-line, backdoor, white-box ...: see docs/choosing.md).",
    )
    validation_fraction: float = option(
        0.1,
        "Share of each client's examples it keeps to choose its adapter with.",
        bound=share("it is a share of the examples"),
    )
    test_fraction: float = option(
        0.1, "Share of each client's examples that only evaluation sees.", bound=share("it is a share of the examples")
    )
    max_length: int = option(
        512,
        "Longest sequence, in tokens; a longer prompt loses its start.",
        bound=at_least(8, "a prompt and an answer must fit"),
    )


@dataclass
class RoundOptions:
    """Rounds of local training"""

    output_dir: str = option(
        "fedlora_run", "Where the adapters, the record, the card and the report go.", resumable=True, side="server"
    )
    num_rounds: int = option(
        3,
        "Rounds of local training and aggregation.",
        bound=at_least(0, "0 evaluates the base model only"),
        resumable=True,
    )
    clients_per_round: int | None = option(
        None,
        "Clients drawn for each round; default all.",
        bound=at_least(1, "leave it out for all clients"),
        side="server",
    )
    local_steps: int | None = option(
        None,
        "Optimizer steps of a client in a round; overrides local_epochs.",
        bound=at_least(1, "leave it out to train by local_epochs"),
    )
    local_epochs: float = option(
        1.0,
        "Passes of a client over its own data in a round.",
        bound=positive("num_rounds=0 trains nothing"),
        needs={"local_steps": (None,)},
    )
    learning_rate: float = option(
        2e-4, "Peak learning rate of a client's local optimizer.", bound=not_negative("0 trains nothing")
    )
    lr_scheduler_type: str = option("constant", "Schedule over one client's steps of one round.")
    remove_unused_columns: bool = option(False, "Kept False: the clients' own collator picks the columns.")
    activation_checkpointing: bool | None = option(
        None,
        "Less memory for about a quarter more time. (Its older name, gradient_checkpointing, is understood too.)",
        resumable=True,
        nargs="?",
        const=True,
    )
    round_lr_scheduler: Literal["constant", "linear", "cosine"] = option(
        "constant", "Schedule of the learning rate over the rounds; a client's own schedule starts from it."
    )
    round_lr_warmup: int = option(
        0, "Rounds over which the learning rate rises first.", bound=at_least(0, "0 starts with the whole rate")
    )
    round_lr_min: float = option(
        0.0,
        "Learning rate of the last round, for round_lr_scheduler linear and cosine.",
        bound=not_negative("0 lets it end with nothing"),
        needs={"round_lr_scheduler": ("linear", "cosine")},
    )
    keep_optimizer: bool = option(
        False, "Each client's optimizer goes on with its moments of the client's last round; default: a fresh one."
    )
    fedprox_mu: float = option(
        0.0,
        "FedProx: weight of half the squared distance to the round's start, added to a client's loss.",
        bound=not_negative("0 leaves the term out"),
    )
    scaffold: bool = option(
        False,
        "SCAFFOLD: control variates on the trained factors correct each client's gradients towards what all have in "
        "common; for aggregation fedavg and ffa, whose factors keep their coordinates from round to round.",
    )
    server_min_clients: int = option(
        1,
        "Fewest usable updates a round may be aggregated from.",
        bound=at_least(1, "a round needs an update"),
        resumable=True,
        side="server",
    )
    max_suspects: str | None = option(
        None,
        "Stop, with nothing changed and exit code 3, at a round with more flagged or quarantined clients than this: a "
        "number, or a share such as 0.25. Default: no limit.",
        resumable=True,
        side="server",
    )
    client_timeout: float | None = option(
        None,
        "Seconds a client's local steps may take in a round; who takes longer is quarantined. Default: no limit.",
        bound=positive("leave it out for no limit"),
        resumable=True,
    )
    client_parallel: Literal["clients", "data"] = option(
        "clients",
        "What several processes share out: the clients of a round, or the batches of each client (data-parallel: a "
        "step has per_device_train_batch_size x gradient_accumulation_steps x processes examples; needed for FSDP).",
    )
    clients_at_once: int = option(
        1,
        "Clients of a round that are trained side by side in one pass over the base, each with an adapter and an "
        "optimizer of its own; adapters to be compared are scored so too. Worth it on a GPU with a small base.",
        bound=at_least(1, "1 trains one client after the other"),
        needs={"client_parallel": ("clients",)},
        resumable=True,
    )
    resume_from: str | None = option(
        None,
        "'last' or a round number of output_dir, or hub:user/repo@round-3: go on from that committed round.",
        resumable=True,
        side="server",
    )
    keep_rounds: int = option(
        2,
        "Committed rounds kept on disk (0: all); the updates still needed are always kept.",
        bound=Bound(
            lambda n: n == 0 or n >= 2, "must be 0 (all) or at least 2", "a round's personal adapters need its start"
        ),
        resumable=True,
        side="server",
    )


@dataclass
class AdapterOptions:
    """Adapter"""

    adapter: Literal["lora", "dirmag"] = option("lora", "Plain LoRA, or direction/magnitude LoRA.")
    lora_r: int = option(16, "Rank.", bound=at_least(1, "pass a positive rank"))
    lora_alpha: int = option(
        32, "The update is scaled by lora_alpha / lora_r.", bound=at_least(1, "the same as lora_r scales by 1")
    )
    lora_dropout: float = option(0.0, "Dropout on the adapter's input.", bound=share("0 drops nothing"))
    use_rslora: bool = option(False, "Scale by lora_alpha / sqrt(lora_r) instead.")
    target_modules: list[str] | None = option(
        None, "Modules that get an adapter (name endings, or all-linear); default PEFT's choice for the architecture."
    )
    initial_adapter: str | None = option(
        None, "Folder of an adapter to start from, so that a stage can be run alone or again.", side="server"
    )
