"""A method's own options: read from NAME=VALUE words, JSON or a mapping, and checked against what the method takes."""
# SPDX-License-Identifier: Apache-2.0

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fedlora_hf.errors import ConfigError
from fedlora_hf.methods.method import Method

Given = Mapping[str, Any] | Sequence[str] | str | None


def read_options(method: Method, given: Given, flag: str = "aggregation_options") -> dict[str, Any]:
    """{option: value of its type} from what a user wrote after `--aggregation_options`.

    given: words NAME=VALUE (a list, or one text with spaces between them), one JSON object, or a mapping, whose values
    are left as they are. ConfigError, one line, for an unknown option, one given twice, or a value of another type.
    """
    if isinstance(given, Mapping):
        options = dict(given)
    else:
        words = _words(given, flag)
        options = (
            _from_json(words[0], flag) if len(words) == 1 and words[0][:1] in "{[" else _pairs(method, words, flag)
        )
    method_options(method, **options)
    return options


def method_options(method: Method, **options: Any) -> Any:
    """The method's frozen options from keyword arguments; ConfigError for an unknown one, a wrong type or value."""
    hints = get_type_hints(method.options)
    for name, value in options.items():
        _known(method, name)
        if not _fits(value, hints[name]):
            raise ConfigError(
                f"{name}={value!r}: must be of type {type_text(hints[name])} (method {method.name!r}); change the value"
            )
    return method.options(**options)


def type_text(hint: Any) -> str:
    """A type as a user reads it: "int", "int or 'auto'", "'output' or 'input'"."""
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(type_text(part) for part in get_args(hint))
    return "none" if hint is NoneType else str(getattr(hint, "__name__", hint))


def _words(given: Sequence[str] | str | None, flag: str) -> list[str]:
    words = [given] if isinstance(given, str) else list(given or ())
    if len(words) == 1 and words[0].strip()[:1] not in ("{", "["):
        try:
            return shlex.split(words[0])
        except ValueError as error:
            raise ConfigError(f"{flag}={words[0]!r}: {error}; write NAME=VALUE NAME=VALUE") from None
    return [word.strip() for word in words if word.strip()]


def _from_json(text: str, flag: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise ConfigError(f"{flag}={text!r}: must be NAME=VALUE ..., or one JSON object; e.g. rank=2 side=input")
    return parsed


def _pairs(method: Method, words: Sequence[str], flag: str) -> dict[str, Any]:
    hints, options = get_type_hints(method.options), {}
    for word in words:
        name, equals, text = word.partition("=")
        if not (name and equals):
            raise ConfigError(f"{flag} {word!r}: must be NAME=VALUE; fedlora methods {method.name} lists the names")
        _known(method, name)
        if name in options:
            raise ConfigError(f"{flag} {word!r}: {name} is given twice; leave one out")
        options[name] = _value(text, hints[name])
    return options


def _known(method: Method, name: str) -> None:
    known = [field.name for field in fields(method.options)]
    if name in known:
        return
    if not known:
        raise ConfigError(f"option {name!r} of method {method.name!r}: its options are: none; remove it")
    meant = get_close_matches(name, known, 1)
    remedy = f"did you mean {meant[0]!r}?" if meant else f"remove it, or see fedlora methods {method.name}"
    raise ConfigError(f"option {name!r} of method {method.name!r}: its options are: {', '.join(known)}; {remedy}")


def _value(text: str, hint: Any) -> Any:
    """`text` as a value of the declared type; as it is where it is none, for the check to complain about."""
    for part in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        if get_origin(part) is Literal:
            for choice in get_args(part):
                if text == str(choice):
                    return choice
        elif part is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        elif part is NoneType and text.lower() in ("none", "null"):
            return None
        elif part is str:
            return text
        elif part in (int, float):
            try:
                return part(text)
            except ValueError:
                continue
    return text


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of an option's declared type: a class, a Literal, or a union of these."""
    origin = get_origin(hint)
    if origin is Literal:
        return value in get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if isinstance(value, bool):  # True is an int to Python, never a count to a user
        return hint is bool
    return isinstance(value, {int: Integral, float: Real}.get(hint, hint))
