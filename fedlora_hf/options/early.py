"""Flags of `fedlora train` looked at before torch is imported, which takes seconds: names, choices, numbers, bounds."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterator, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Literal, get_args, get_origin

from fedlora_hf.errors import ConfigError, one_line
from fedlora_hf.options import GROUPS
from fedlora_hf.options.arguments import ARGUMENTS
from fedlora_hf.options.facts import check_number, facts_of, kind_of
from fedlora_hf.options.numbers import NUMBERS
from fedlora_hf.options.spelling import ALIASES, suggestion

OWN = {item.name: item for group in GROUPS for item in fields(group)}
_ALSO = {"config", "help", "help_all"}
KNOWN = frozenset(OWN) | frozenset(ARGUMENTS) | _ALSO


def checked(arguments: Sequence[str]) -> list[str]:
    """The arguments with other people's names for our flags replaced; ConfigError for what cannot be right."""
    found: list[str] = []
    for word in arguments:
        if not word.startswith("--") or word == "--":
            found.append(word)
            continue
        flag, equals, value = word[2:].partition("=")
        found.append(f"--{named(flag.replace('-', '_'))}{equals}{value}")
    for name, values in _given(found):
        _check_values(name, values)
    return found


def named(name: str) -> str:
    """The flag's name here; ConfigError, with what was meant, for one that there is not."""
    if name not in KNOWN and name in ALIASES:
        return ALIASES[name]
    shortened = any(known.startswith(name) for known in KNOWN)  # which argparse understands, or calls ambiguous
    if name in KNOWN or shortened or (name.startswith("no_") and name[3:] in KNOWN):
        return name
    said = suggestion(name, KNOWN)
    raise ConfigError(f"--{name} is no flag of fedlora train{'; ' + said if said else ''}; see fedlora train --help")


def _given(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(flag, the words after it)."""
    name, values = "", list[str]()
    for word in [*arguments, "--"]:
        if not word.startswith("--"):
            values.append(word)
            continue
        if name:
            yield name, values
        name, equals, value = word[2:].partition("=")
        values = [value] if equals else []


def _check_values(name: str, values: list[str]) -> None:
    """ConfigError for a value that is no choice, no number or out of bounds; of Trainer's options the numbers."""
    if len(values) != 1 or (name not in OWN and name not in NUMBERS):
        return
    (text,) = values
    kind, bound = (
        NUMBERS[name] if name in NUMBERS else (kind_of(OWN[name]), getattr(facts_of(OWN[name]), "bound", None))
    )
    if get_origin(kind) is Literal:
        choices = list(map(str, get_args(kind)))
        if text not in choices:
            close = get_close_matches(text, choices, 1, 0.6)
            raise ConfigError(
                f"{name}={one_line(text)}: must be one of {', '.join(choices)}; "
                f"{f'did you mean {close[0]}?' if close else 'choose one of these'}"
            )
    elif kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            what = "whole number" if kind is int else "number"
            raise ConfigError(f"{name}={one_line(text)}: must be a {what}; see fedlora train --help") from None
        if bound is not None:
            check_number(name, value, kind, bound, one_line(text))
