"""`fedlora train --help`: our own options by group, at once. The parser that reads flags needs transformers, and time.

What is printed here is the fields of options/; `--help_all` prints the flags of TrainingArguments too.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
from collections.abc import Sequence
from dataclasses import Field, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fedlora_hf.methods import METHODS
from fedlora_hf.methods.method import SAID
from fedlora_hf.options import GROUPS

USAGE = "fedlora train --model_name_or_path MODEL --dataset DATA [--OPTION VALUE ...] [--config FILE]"
# Flags of TrainingArguments that most runs need, in our words.
BORROWED = {
    "per_device_train_batch_size": "Examples in a step of a client.",
    "gradient_accumulation_steps": "Batches in an optimizer step.",
    "weight_decay": "Of a client's local optimizer.",
    "bf16": "Train in mixed precision.",
    "use_cpu": "Even where there is a GPU.",
    "seed": "Of the whole run.",
    "report_to": "One or more of tensorboard, trackio, wandb ...; default none.",
    "disable_tqdm": "No progress on the terminal.",
    "push_to_hub": "Push the output folder, private unless --hub_private_repo False.",
    "hub_model_id": "Repository to push to: user/name.",
    "hub_strategy": "end: once; every_save: every round too, in the background.",
}
_METAVARS = {int: "N", float: "X", bool: "", str: "TEXT"}


def manual() -> str:
    """The help of `fedlora train`."""
    parser = argparse.ArgumentParser(
        prog="fedlora train",
        usage=USAGE,
        description="Rounds of local training and aggregation.",
        epilog=_methods(),
        formatter_class=_Formatter,
        add_help=False,
    )
    general = parser.add_argument_group("This help")
    general.add_argument("-h", "--help", action="store_true", help="Show the federated options (this help).")
    general.add_argument("--help_all", action="store_true", help="Every flag, TrainingArguments' too (slower).")
    general.add_argument("--config", metavar="FILE", help="YAML file of flags; flags on the command line override it.")
    for options in GROUPS:
        group = parser.add_argument_group(str(options.__doc__))
        kinds = get_type_hints(options)  # not the fields' own, which HfArgumentParser rewrites
        for item in fields(options):
            group.add_argument(f"--{item.name}", metavar=_metavar(kinds[item.name]), help=_text(item))
    borrowed = parser.add_argument_group(
        "Of transformers.TrainingArguments, all of whose flags are there: the most used"
    )
    for name, text in BORROWED.items():
        borrowed.add_argument(f"--{name}", metavar="", help=text)
    return parser.format_help()


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)


def _text(item: "Field[Any]") -> str:
    shown = "" if item.default in (None, False) else f" [{item.default}]"
    return f"{item.metadata['help']}{shown}".replace("%", "%%")


def _metavar(kind: Any) -> str:
    """What stands behind a flag: the choices of a Literal, or a letter for the type."""
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) in (Union, UnionType):
        inner: Sequence[Any] = [part for part in get_args(kind) if part is not type(None)]
        if int in inner and str in inner:  # a number, or the one word for finding it: see its help
            return "auto|N"
        if len(inner) > 1:
            return "DATA ..." if list[str] in inner else "NAME=VALUE ..."
        return _metavar(inner[0])
    return "NAME ..." if get_origin(kind) is list else _METAVARS[kind]


def _methods() -> str:
    width = max(map(len, METHODS))
    listing = "\n".join(f"  {name:{width}}  {method.title}" for name, method in METHODS.items())
    about = "Aggregation methods (fedlora methods NAME tells their options):"
    return f"{about}\n{listing}\n{_counts()}\n\nIn [brackets]: the default. A flag without a value is true."


def _counts() -> str:
    """Which methods believe the clients' numbers of examples."""
    named = {trust: ", ".join(name for name, m in METHODS.items() if m.counts == trust) for trust in SAID}
    return "\n".join(
        [
            "Numbers of examples are claims:",
            f"  held to weight_cap times the cohort's median: {named['capped']}",
            f"  trusted: {named['trusted']}",
            f"  not used, every client counts once: {named['unused']}",
        ]
    )
