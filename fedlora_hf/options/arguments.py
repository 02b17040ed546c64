"""What becomes of every field of `transformers.TrainingArguments`: followed, replaced by an option of ours, or refused.

A federation trains many clients for a few steps each, so some of Trainer's fields have no meaning, or another one. None
of them is accepted and then ignored. The table is total over the fields of every supported version (a test compares
it), and docs/trainer.md is made from it: `python -m fedlora_hf.options.arguments docs/trainer.md`.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from fedlora_hf.errors import ConfigError, one_line
from fedlora_hf.options.needs import NEEDS

Fate = Literal["followed", "replaced", "refused", "no effect"]


@dataclass(frozen=True)
class Argument:
    """fate: "followed" (as Trainer does, or as `text` says), "replaced" (by an option of ours: setting it is an error
    that names the option), "refused" (an error when set) or "no effect" (in Trainer neither).

    text: what becomes of it, for the manual and, of a refused one, for the error. values: of a followed one, all that
    can be followed (empty: any).
    """

    fate: Fate
    text: str
    values: tuple[str, ...] = ()


def _followed(names: str, text: str, *values: str) -> dict[str, Argument]:
    return dict.fromkeys(names.split(), Argument("followed", text, values))


def _refused(names: str, text: str) -> dict[str, Argument]:
    return dict.fromkeys(names.split(), Argument("refused", text))


def _replaced(name: str, text: str) -> dict[str, Argument]:
    return {name: Argument("replaced", text)}


LENGTH = {
    **_replaced(
        "num_train_epochs",
        "say --local_epochs (passes of a client over its own data in a round) and --num_rounds (rounds of all)",
    ),
    **_replaced("max_steps", "say --local_steps (optimizer steps of a client in a round) and --num_rounds"),
    **_followed("learning_rate", "peak rate of a client's optimizer in a round; 2e-4 unless said otherwise"),
    **_followed("lr_scheduler_type lr_scheduler_kwargs warmup_steps", "over one client's steps of one round"),
}
OPTIMISATION = {
    **_followed("per_device_train_batch_size gradient_accumulation_steps", "of a client's local steps"),
    **_followed("optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm", "client by client"),
    **_followed("label_smoothing_factor", "in the training loss alone; held-out losses are without it"),
    **_refused("optim_target_modules", "an optimizer for some modules alone has no adapter to act on; leave it out"),
    **_followed("bf16 fp16 tf32", "in training; scores are taken in the model's own dtype"),
    **_refused("bf16_full_eval fp16_full_eval", "would cast the model, in which training goes on; leave it out"),
    **_followed("activation_checkpointing gradient_checkpointing", "one meaning under both names"),
    **_followed("activation_checkpointing_kwargs", "one meaning under both names; from transformers 5.23 on"),
    **_followed("gradient_checkpointing_kwargs", "one meaning under both names"),
    **_followed("torch_compile torch_compile_backend torch_compile_mode", "the model is compiled in place, once"),
    **_refused(
        "use_liger_kernel liger_kernel_config", "its kernels are not put in place for local steps; leave it out"
    ),
    **_refused("neftune_noise_alpha", "has no effect on clients' local steps; leave it out"),
    **_refused("auto_find_batch_size", "clients would train with batches of different sizes; set a size"),
    **_followed("use_cache torch_empty_cache_steps", "as Trainer does"),
    **_followed("average_tokens_across_devices", "always so: with --client_parallel data tokens are counted over all"),
}
DATA = {
    **_followed(
        "train_sampling_strategy",
        "random, sequential or group_by_length, in each client's own data; batch_rebalance is refused",
        "random",
        "sequential",
        "group_by_length",
    ),
    **_refused("length_column_name", "lengths are counted on input_ids; leave it out"),
    **_followed("data_seed", "draws the order of examples in place of seed; adapter, dropout and cohorts keep seed"),
    **_followed("dataloader_drop_last", "a client's last, smaller batch of an epoch is left out, if there is another"),
    **_followed("dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor", "of a client's loader"),
    **_followed("dataloader_persistent_workers", "workers last for a client's local steps, and end with them"),
    **_followed("dataloader_multiprocessing_context dataloader_in_order", "of a client's loader"),
    **_refused("remove_unused_columns", "the clients' own collator picks the columns; leave it out"),
    **_refused("label_names", "labels are in the column labels; rename yours"),
    **_followed("seed full_determinism", "every generator of the run is derived from it, by purpose, client and round"),
    **_refused("ignore_data_skip", "a round that is resumed starts at its own beginning; leave it out"),
}
LOGGING = {
    **_followed(
        "logging_strategy",
        "steps: every logging_steps local steps of the run; epoch: once a round; no: never",
        "steps",
        "epoch",
        "no",
    ),
    **_followed("logging_steps logging_first_step", "in local steps of the whole run; a number below 1 is a share"),
    **_followed("logging_nan_inf_filter", "a step without a finite loss is left out of what is logged"),
    **_followed("include_num_input_tokens_seen", "tokens of this process's clients; of all of them after each round"),
    **_followed("log_on_each_node log_level log_level_replica disable_tqdm", "as Trainer does"),
    **_followed("report_to run_name project", "each round, and each logged step, as Trainer's trackers take them"),
    **_followed("trackio_space_id trackio_bucket_id trackio_static_space_id", "as Trainer does"),
    **_refused("debug", "Trainer.train() is not called, whose loop it watches; leave it out"),
    **_refused("skip_memory_metrics", "memory is not measured; leave it out"),
}
EVALUATION = {
    **_followed(
        "per_device_eval_batch_size", "of every split that is scored, for its longest examples; more of shorter ones"
    ),
    **_followed(
        "eval_strategy eval_steps eval_delay eval_on_start", "counted in rounds: steps and epoch both mean those"
    ),
    **_followed(
        "metric_for_best_model greater_is_better", "of eval_global_loss and the like; default eval_global_loss"
    ),
    **_followed("load_best_model_at_end", "the best evaluated round becomes the result"),
    **_followed("include_for_metrics", "inputs and loss, in compute_metrics"),
    **_followed("prediction_loss_only", "no logits are kept, and compute_metrics is not called"),
    **_followed("eval_accumulation_steps", "always so: logits leave the device after every batch"),
    **_refused("eval_do_concat_batches", "compute_metrics gets all of a client's batches joined; leave it out"),
    **_refused("batch_eval_metrics", "compute_metrics gets all of a client's batches at once; leave it out"),
    **_refused("eval_use_gather_object", "a client is scored by one process; leave it out"),
}
SAVING = {
    **_followed("output_dir", "global adapter, personal ones, record, card, report and committed rounds"),
    **_followed(
        "save_strategy",
        "every round is committed whatever it says, for going on; it says after which on_save is called",
        "steps",
        "epoch",
        "no",
        "best",
    ),
    **_followed("save_steps", "with save_strategy steps: rounds between two calls of on_save; default every round"),
    **_followed("save_total_limit", "committed rounds that are kept, as --keep_rounds (at least 2)"),
    **_refused("save_on_each_node", "the first process writes, for all; leave it out"),
    "save_only_model": Argument("no effect", "a committed round holds adapters and the record, no optimizer"),
    **_refused("enable_jit_checkpoint", "a round that is under way goes on from its finished clients; leave it out"),
    **_refused("restore_callback_states_from_checkpoint", "callbacks start afresh; leave it out"),
    **_replaced("resume_from_checkpoint", "say --resume_from last, or a round's number, or hub:user/name"),
    **_followed(
        "push_to_hub hub_token hub_private_repo hub_model_id",
        "private unless hub_private_repo is False; for a push alone",
    ),
    **_followed(
        "hub_strategy hub_always_push hub_revision", "every strategy but end pushes each round; for a push alone"
    ),
}
MACHINES = {
    **_followed("use_cpu local_rank ddp_backend ddp_timeout", "as Trainer does"),
    **_followed("deepspeed", "ZeRO stage 3 shards the frozen base; other stages change nothing"),
    **_followed("fsdp fsdp_config", "version 2 shards the frozen base; adapters stay whole"),
    **_refused("ddp_find_unused_parameters ddp_bucket_cap_mb", "no model is wrapped in DDP; leave it out"),
    **_refused("ddp_broadcast_buffers ddp_static_graph", "no model is wrapped in DDP; leave it out"),
    **_refused("accelerator_config", "clients' batches are divided by --client_parallel; leave it out"),
    **_refused("parallelism_config", "processes train different clients, or share one (--client_parallel data)"),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), Argument("no effect", "a script's own flags")),
}
GROUPS: Mapping[str, Mapping[str, Argument]] = {
    "Length and learning rate": LENGTH,
    "Optimisation": OPTIMISATION,
    "Data": DATA,
    "Logging": LOGGING,
    "Evaluation": EVALUATION,
    "Saving and the Hub": SAVING,
    "Machines": MACHINES,
}
ARGUMENTS: Mapping[str, Argument] = {name: rule for group in GROUPS.values() for name, rule in group.items()}
# Fields of some of the supported versions (transformers 5.17 and later) only.
NOT_IN_ALL = frozenset({"activation_checkpointing", "activation_checkpointing_kwargs"})


def check_arguments(args: Any, names: Iterable[str]) -> None:
    """ConfigError for the first of the TrainingArguments `names` that is set to what cannot be followed.

    args: the dataclass as its user made it, before TrainingArguments has filled in anything.
    """
    defaults = {field.name: _default(field) for field in dataclasses.fields(args)}
    for name in sorted(names):
        rule, value = ARGUMENTS.get(name), _plain(getattr(args, name))
        if value == _plain(defaults[name]) or (not value and not _plain(defaults[name])):
            continue
        shown = f"{name}={one_line(value, 80)}"
        if rule is None:
            raise ConfigError(f"{shown}: this version does not know what it means for a federation; leave it out")
        if rule.fate in ("replaced", "refused"):
            raise ConfigError(f"{shown}: {rule.text}")
        if rule.values and value not in rule.values:
            raise ConfigError(f"{shown}: must be one of {', '.join(rule.values)}; {rule.text}")


def fill_in(args: Any) -> None:
    """Give what evaluation and saving leave open the meaning that they have in rounds, before TrainingArguments does.

    ConfigError for what contradicts itself.
    """
    strategy = _plain(args.eval_strategy)
    if args.evaluate_rounds and strategy == "no":
        args.eval_strategy = strategy = "epoch"
    if strategy == "steps" and args.eval_steps is None:
        args.eval_steps = 1
    best = args.load_best_model_at_end or _plain(args.save_strategy) == "best"
    if best and strategy == "no":
        name = "load_best_model_at_end" if args.load_best_model_at_end else "save_strategy=best"
        raise ConfigError(f"{name}: needs rounds that are evaluated; pass --eval_strategy epoch")
    if best and args.metric_for_best_model is None:
        args.metric_for_best_model = "eval_global_loss"
    if args.load_best_model_at_end and _plain(args.save_strategy) in ("steps", "no"):
        # Every round is committed, so the best one is there whatever the cadence of on_save.
        args.save_strategy, args.save_steps = strategy, args.eval_steps if strategy == "steps" else args.save_steps
    if args.save_total_limit is not None:
        args.keep_rounds = max(2, int(args.save_total_limit))


def _default(field: "dataclasses.Field[Any]") -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def table() -> str:
    """The table in Markdown, a section for each group."""
    lines: list[str] = []
    for title, group in GROUPS.items():
        lines += [f"### {title}", "", "| argument | | what becomes of it |", "|---|---|---|"]
        lines += [f"| `{name}` | {rule.fate} | {rule.text}{_needed(name)} |" for name, rule in group.items()]
        lines.append("")
    return "\n".join(lines)


def _needed(name: str) -> str:
    return f" ({NEEDS[name].said.partition(';')[0]})" if name in NEEDS else ""


BEGIN, END = "<!-- made by fedlora_hf.options.arguments -->", "<!-- end -->"


def with_table(page: str) -> str:
    """A page with the table as it is now between its two marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(with_table(Path(name).read_text(encoding="utf-8")), encoding="utf-8")
