"""What is said about an option, in its field: help, bound, needs, resumability, side; and the checks of these."""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from numbers import Integral, Real
from types import UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin

from fedlora_hf.errors import ConfigError, one_line

Kind = type[int] | type[float]


@dataclass(frozen=True)
class Bound:
    """What a value must satisfy (`holds`), said in words (`rule`), and what to do otherwise (`remedy`)."""

    holds: Callable[[Any], bool]
    rule: str
    remedy: str


def at_least(low: float, remedy: str) -> Bound:
    """`low` or above; infinity passes, NaN does not."""
    return Bound(lambda value: value >= low, f"must be at least {low}", remedy)


def share(remedy: str) -> Bound:
    """From 0 to below 1."""
    return Bound(lambda value: 0 <= value < 1, "must be in [0, 1)", remedy)


def positive(remedy: str) -> Bound:
    """Above 0, and finite."""
    return Bound(lambda value: 0 < value < math.inf, "must be a finite number above 0", remedy)


def not_negative(remedy: str) -> Bound:
    """0 or above, and finite."""
    return Bound(lambda value: 0 <= value < math.inf, "must be a finite number, 0 or above", remedy)


class Given:
    """Stands for any value that switches an option on."""


GIVEN: Final = Given()
Needs = Mapping[str, tuple[object, ...] | Given]


class Help(str):
    """An option's help, which carries the other facts about it.

    They travel with the text because `HfArgumentParser` takes every key of a field's metadata for one of argparse's.

    bound: of the value, where one is given. needs: {another option: the values with which this one has an effect}.
    resumable: a resumed run may have another value, since it moves no number of the rounds before.
    side: "server" for what a Flower node never reads; "both" otherwise.
    """

    bound: Bound | None
    needs: Needs
    resumable: bool
    side: Literal["server", "both"]


def option(
    default: Any,
    text: str,
    *,
    bound: Bound | None = None,
    needs: Needs | None = None,
    resumable: bool = False,
    side: Literal["server", "both"] = "both",
    **more: Any,
) -> Any:
    """A dataclass field with the facts about it (`Help`); `more`: what else argparse shall know.

    Write {} as None: instances share it.
    """
    facts = Help(text)
    facts.bound, facts.needs, facts.resumable, facts.side = bound, needs or {}, resumable, side
    return field(default=default, metadata={"help": facts, **more})


def facts_of(item: "Field[Any]") -> Help | None:
    """The facts about an option of ours, None for a field of another dataclass."""
    facts = item.metadata.get("help")
    return facts if isinstance(facts, Help) else None


def kind_of(item: "Field[Any]") -> Any:
    """The one type of a field's values, None apart; None where there are several."""
    kinds = get_args(item.type) if get_origin(item.type) in (Union, UnionType) else (item.type,)
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    return kinds[0] if len(kinds) == 1 else None


def differs(value: object, item: "Field[Any]") -> bool:
    """Whether a field's value is not its default."""
    default = item.default if item.default_factory is MISSING else item.default_factory()
    return bool(value != default)


def check_number(name: str, value: object, kind: Kind, bound: Bound, shown: str | None = None) -> None:
    """ConfigError where a value is no number of this kind, or out of its bound; None passes. shown: how it was said."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
        what = "whole number" if kind is int else "number"
        raise ConfigError(f"{name}={one_line(repr(value), 80)}: must be a {what}; {bound.remedy}")
    if not bound.holds(value):
        raise ConfigError(f"{name}={value if shown is None else shown}: {bound.rule}; {bound.remedy}")


def check_bounds(options: Any) -> None:
    """ConfigError for the first value, in the manual's order, that is out of its bound."""
    for item in fields(options):
        facts, value = facts_of(item), getattr(options, item.name)
        if facts is None or facts.bound is None or value is None:
            continue
        kind = kind_of(item)
        if kind in (int, float):
            check_number(item.name, value, kind, facts.bound)
        elif not facts.bound.holds(value):
            raise ConfigError(f"{item.name}={value}: {facts.bound.rule}; {facts.bound.remedy}")


def check_effects(options: Any) -> None:
    """ConfigError for the first option that is set and cannot have an effect beside the others.

    Set is what differs from the default and switches something on: None, False, or 0 where the default is a number,
    asks for what happens anyway.
    """
    for item in fields(options):
        facts, value = facts_of(item), getattr(options, item.name)
        if facts is None or not differs(value, item) or _off(value, item):
            continue
        for other, values in facts.needs.items():
            if not _met(getattr(options, other), values):
                raise ConfigError(f"{item.name}={_shown(value)}: {_unmet(other, values)}, or leave {item.name} out")


def _off(value: object, item: "Field[Any]") -> bool:
    return value is None or value is False or (value == 0 and item.default is not None)


def _met(value: object, values: tuple[object, ...] | Given) -> bool:
    return bool(value) if isinstance(values, Given) else value in values


def _unmet(other: str, values: tuple[object, ...] | Given) -> str:
    if isinstance(values, Given):
        return f"has no effect without {other}; pass --{other}"
    if values == (None,):
        return f"has no effect beside {other}; leave {other} out"
    return f"has an effect with {other} {' or '.join(map(str, values))} only; pass --{other} {values[0]}"


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
