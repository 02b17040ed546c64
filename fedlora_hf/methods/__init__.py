"""Aggregation methods as a user meets them: names, options, papers. Nothing here imports torch, so help is instant.

What a method computes is in `fedlora_hf/aggregation/<name>.py`, which is loaded when it is first used.
"""
# SPDX-License-Identifier: Apache-2.0

from difflib import get_close_matches

from fedlora_hf.errors import ConfigError
from fedlora_hf.methods import clair, means, merging, own, robust
from fedlora_hf.methods.method import Method

METHODS: dict[str, Method] = {
    method.name: method for family in (clair, means, robust, merging) for method in family.METHODS
}


def method_named(name: str) -> Method:
    """The method of that name: ours, one that was registered or installed, or MODULE:NAME; else a ConfigError that
    lists the names there are."""
    if not isinstance(name, str):
        raise ConfigError(f"aggregation method {name!r}: must be a name; fedlora methods lists them")
    if name in METHODS:
        return METHODS[name]
    method = own.found(name)
    if method is not None:
        return method
    listed = [*METHODS, *own.names()]
    meant = get_close_matches(name, listed, 1)
    remedy = f"did you mean {meant[0]!r}?" if meant else "choose one of these, or MODULE:NAME of your own"
    raise ConfigError(f"aggregation method {name!r}: must be one of {', '.join(listed)}; {remedy}")


def register_method(method: Method) -> Method:
    """Make a method of your own known by its name in this process; gives it back. See docs/own_method.md.

    ```python
    from dataclasses import replace

    from fedlora_hf import register_method
    from fedlora_hf.aggregation import rule_of
    from fedlora_hf.methods import METHODS, method_named

    mean = METHODS["product_mean"]
    register_method(replace(mean, name="my_mean", title="The exact mean, under my name", rule=rule_of(mean)))
    assert method_named("my_mean").title.startswith("The exact mean")
    ```
    """
    if getattr(method, "name", None) in METHODS:
        raise ConfigError(f"method {method.name!r}: is one of ours; give yours another name")
    return own.register_method(method)
