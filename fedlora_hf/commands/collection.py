"""A collection of adapters from anywhere: their names, the bases they were trained on, the weights they are given."""
# SPDX-License-Identifier: Apache-2.0

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from fedlora_hf.errors import ConfigError, one_line
from fedlora_hf.hub import Source, parse_source
from fedlora_hf.util.disk import read_regular
from fedlora_hf.util.names import fit_ids, telling_names

MAX_WEIGHTS_BYTES = 4 * 1024 * 1024
_LARGEST = 2**53


def named(adapters: Sequence[str]) -> dict[str, Source]:
    """{client id: source}, sorted; ConfigError for a source given twice."""
    sources = [parse_source(text) for text in adapters]
    names = telling_names([source.steps for source in sources])
    if len(set(names)) < len(names):
        twice = next(text for text, name in zip(adapters, names, strict=True) if names.count(name) > 1)
        raise ConfigError(f"{twice}: is given twice; name every adapter once")
    ids = fit_ids(names)
    return dict(sorted((ids[name], source) for name, source in zip(names, sources, strict=True)))


def bases_of(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """{base as the adapters name it, with its revision: the clients on it}, the most common first (a tie: by name)."""
    found: dict[str, list[str]] = {}
    for client, config in sorted(configs.items()):
        name, revision = config.get("base_model_name_or_path"), config.get("revision")
        text = one_line(name, 200) if isinstance(name, str) and name else "not named"
        text += f"@{one_line(revision, 60)}" if isinstance(revision, str) and revision else ""
        found.setdefault(text, []).append(client)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))


def check_bases(bases: Mapping[str, Sequence[str]], require_same: bool) -> list[str]:
    """Lines that tell of differing bases, [] where there is one; ConfigError where one is required."""
    if len(bases) < 2:
        return []
    if require_same:
        (first, many), (second, few) = list(bases.items())[:2]
        raise ConfigError(
            f"require_same_base: the adapters name {len(bases)} base models, {first} ({len(many)} of them) and "
            f"{second} ({few[0]}) among them; leave out those of another base"
        )
    lines = [
        f"warning: the adapters name {len(bases)} base models; an average makes sense only if they are one and "
        "the same under several names (--require_same_base stops here):"
    ]
    for base, clients in bases.items():
        some = ", ".join(clients[:5]) + (f" and {len(clients) - 5} more" if len(clients) > 5 else "")
        lines.append(f"  {base}: {some}")
    return lines


def read_weights(given: Sequence[str], clients: Iterable[str]) -> dict[str, int]:
    """{client: how much it counts}, as whole numbers in the given proportions.

    given: "a=2", "b=0.5" ...; or one file, JSON or YAML of {client: weight}. Raises ConfigError for an unknown or
    missing client, and for what is no number above 0.
    """
    known = sorted(clients)
    pairs = _pairs(given)
    for name in pairs:
        if name not in known:
            meant = (get_close_matches(name, known, 1) or known)[0]
            raise ConfigError(f"weights: {one_line(name, 60)!r} is no client here; did you mean {meant!r}?")
    if missing := [name for name in known if name not in pairs]:
        raise ConfigError(f"weights: client {missing[0]!r} has none; give every client one")
    exact = {name: _weight(name, value) for name, value in sorted(pairs.items())}
    common = math.lcm(*(weight.denominator for weight in exact.values()))
    whole = {name: int(weight * common) for name, weight in exact.items()}
    divisor = math.gcd(*whole.values())
    whole = {name: weight // divisor for name, weight in whole.items()}
    if max(whole.values()) >= _LARGEST:
        raise ConfigError("weights: differ by too many digits; round them to six or so")
    return whole


def _pairs(given: Sequence[str]) -> dict[str, Any]:
    if len(given) == 1 and "=" not in given[0]:
        try:
            content = yaml.safe_load(read_regular(Path(given[0]).expanduser(), MAX_WEIGHTS_BYTES).decode("utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(
                f"weights={given[0]!r}: {one_line(error, 100)}; give a=2 b=1 ..., or a file of client: weight"
            ) from None
        if not isinstance(content, dict) or not content:
            raise ConfigError(f"weights={given[0]!r}: must hold client: weight, in JSON or YAML; correct the file")
        return {str(name): value for name, value in content.items()}
    split = [text.rpartition("=") for text in given]
    names = Counter(name for name, _, _ in split)
    for text, (name, sign, _) in zip(given, split, strict=True):
        if not (name and sign):
            raise ConfigError(f"weights: {one_line(text, 60)!r} must be client=weight, such as a=2")
        if names[name] > 1:
            raise ConfigError(f"weights: {one_line(name, 60)!r} is given twice; give it once")
    return {name: value for name, _, value in split}


def _weight(name: str, value: Any) -> Fraction:
    try:
        if isinstance(value, bool):
            raise ValueError(value)
        weight = Fraction(str(value).strip())
    except (ValueError, ZeroDivisionError):
        weight = Fraction(0)
    if weight <= 0:
        raise ConfigError(f"weights: {name}={one_line(value, 40)} must be a number above 0; for 0, leave it out")
    return weight
