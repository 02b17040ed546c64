"""Aggregation methods as a user meets them: names, options, papers. Nothing here imports torch, so help is instant.

What a method computes is in `fedlora_hf/aggregation/<name>.py`, which is loaded when it is first used.
"""
# SPDX-License-Identifier: Apache-2.0

from difflib import get_close_matches

from fedlora_hf.errors import ConfigError
from fedlora_hf.methods import clair, means, merging, robust
from fedlora_hf.methods.method import Method

METHODS: dict[str, Method] = {
    method.name: method for family in (clair, means, robust, merging) for method in family.METHODS
}


def method_named(name: str) -> Method:
    """The method of that name, or a ConfigError that lists the names there are."""
    if name not in METHODS:
        meant = get_close_matches(name, METHODS, 1)
        remedy = f"did you mean {meant[0]!r}?" if meant else "choose one of these"
        raise ConfigError(f"aggregation method {name!r}: must be one of {', '.join(METHODS)}; {remedy}")
    return METHODS[name]
