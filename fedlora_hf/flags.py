"""The flags of a run, from a command line or a YAML file, as a FederatedConfig."""
# SPDX-License-Identifier: Apache-2.0

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from fedlora_hf.config import FederatedConfig
from fedlora_hf.errors import ConfigError
from fedlora_hf.options.early import checked
from fedlora_hf.options.spelling import ALIASES, suggestion
from fedlora_hf.util.disk import read_regular

MAX_CONFIG_BYTES = 1024 * 1024

# Of a union with `str` HfArgumentParser would take one word only.
_SEVERAL_WORDS = ("report_to", "aggregation_options", "dataset", "validation_dataset", "test_dataset")


class FlagParser(HfArgumentParser):
    """The flags of FederatedConfig; a complaint is one line."""

    def __init__(self) -> None:
        super().__init__(
            cast(Any, FederatedConfig),
            prog="fedlora train",
            usage="fedlora train [--OPTION VALUE ...] [--config FILE]",
            add_help=False,
        )
        self.add_argument("--config", help="YAML file of flags; flags on the command line override it")
        self.add_argument("--help_all", action="help", help="this list; --help shows the federation's own, in groups")
        for action in self._actions:
            if action.type is string_to_bool and action.nargs is None:
                action.nargs, action.const = "?", True  # a bare flag is true, for `bool | None` too
            if action.dest in _SEVERAL_WORDS:
                action.nargs = "+"

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see fedlora train --help_all")


def parse(arguments: Sequence[str]) -> FederatedConfig:
    """The config from flags; `--config FILE` gives defaults from a YAML file, which flags override."""
    arguments, parser = checked(arguments), FlagParser()
    known, _ = parser.parse_known_args(list(arguments))
    given = _from_yaml(known.config, parser) if known.config else []
    values = vars(parser.parse_args([*given, *arguments]))
    values.pop("config")
    try:
        return FederatedConfig(**values)
    except (ValueError, ImportError, TypeError, KeyError, OSError) as error:
        # TrainingArguments says what is wrong over several lines; ours are one line already.
        raise ConfigError(" ".join(str(error).split())[:400]) from None


def _from_yaml(path: str, parser: HfArgumentParser) -> list[str]:
    """The flags that a YAML file stands for, so that its values are checked as those of the command line are."""
    try:
        text = read_regular(Path(path), MAX_CONFIG_BYTES).decode("utf-8")
        # An alias stands for what was written elsewhere: a few lines of them unfold to fill the memory with.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError("aliases (*name) are not for flags")
        _check_once(yaml.compose(text, yaml.SafeLoader))
        content = yaml.safe_load(text)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--config {path}: {str(error).splitlines()[0]}; give a YAML file of flags") from None
    if isinstance(content, dict):
        content = {ALIASES.get(str(name), name): value for name, value in content.items()}
    flags = {action.dest for action in parser._actions}
    odd = sorted(map(str, set(content) - flags)) if isinstance(content, dict) else ["not a mapping"]
    if odd:
        said = suggestion(odd[0], flags)
        more = f"; {said}" if said else ""
        raise ConfigError(
            f"--config {path}: {odd[0]!r} is no flag of fedlora train{more}; see fedlora train --help_all"
        )
    given: list[str] = []
    for name, value in content.items():
        if value is None and parser.get_default(name) is not None:
            raise ConfigError(f"--config {path}: {name} has no value; give it one, or leave the line out")
        texts = [json.dumps(v, default=str) if isinstance(v, dict | bool) else str(v) for v in _as_list(value)]
        given += [f"--{name}", *texts] if isinstance(value, list) else [f"--{name}={text}" for text in texts]
    return given


def _check_once(node: yaml.Node | None) -> None:
    """ValueError for a key that stands twice in one mapping: the second would replace the first without a word."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            if name in seen:
                raise ValueError(f"{name} stands twice, the second time in line {key.start_mark.line + 1}")
            seen.add(name)
            _check_once(value)


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
