"""Methods from elsewhere: registered from Python, named as module:NAME, or installed under an entry point."""
# SPDX-License-Identifier: Apache-2.0

from dataclasses import is_dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from fedlora_hf.errors import ConfigError, one_line
from fedlora_hf.methods.method import Method

GROUP = "fedlora_hf.methods"
_registered: dict[str, Method] = {}


def register_method(method: Method) -> Method:
    """Keep a method under its name; ConfigError when it is no Method with a rule, or its name is taken."""
    checked(method, f"method {getattr(method, 'name', method)!r}")
    if method.name in _registered and _registered[method.name] != method:
        raise ConfigError(f"method {method.name!r}: the name is taken; give it another")
    _registered[method.name] = method
    return method


def found(name: str) -> Method | None:
    """The method that `name` stands for outside this package; None for none.

    ConfigError for a module:NAME that cannot be imported or is no method.
    """
    if name in _registered:
        return _registered[name]
    if ":" in name:
        return _imported(name)
    for point in entry_points(group=GROUP, name=name):
        return checked(_loaded(point.load, f"entry point {name!r} of {GROUP}"), f"entry point {name!r} of {GROUP}")
    return None


def names() -> list[str]:
    """The names of methods registered here or installed under an entry point, sorted."""
    return sorted({*_registered, *(point.name for point in entry_points(group=GROUP))})


def checked(method: Any, what: str) -> Method:
    """`method`, which is a Method with a rule and a dataclass of options; else ConfigError, one line."""
    if not isinstance(method, Method):
        raise ConfigError(f"{what}: is {type(method).__name__}, must be a fedlora_hf.methods.method.Method; make one")
    if not callable(method.rule):
        raise ConfigError(f"{what}: has no rule; pass rule=function, of (cohort, options), to Method")
    if not (isinstance(method.options, type) and is_dataclass(method.options)):
        raise ConfigError(f"{what}: options must be a dataclass; leave it out for none")
    if not method.name.replace("-", "_").isidentifier():
        raise ConfigError(f"{what}: its name {method.name!r} must be letters, digits, _ and -; change it")
    return method


def _imported(name: str) -> Method:
    module, _, attribute = name.partition(":")
    what = f"aggregation {name!r}"
    loaded = _loaded(lambda: import_module(module), what) if module else None
    if not hasattr(loaded, attribute):
        raise ConfigError(f"{what}: {module!r} has no {attribute!r}; write MODULE:NAME of a Method")
    return checked(getattr(loaded, attribute), what)


def _loaded(load: Any, what: str) -> Any:
    try:
        return load()
    except Exception as error:  # whatever somebody else's module raises as it is imported
        raise ConfigError(
            f"{what}: cannot be imported ({type(error).__name__}: {one_line(error, 200)}); install it, or put its "
            "folder on PYTHONPATH"
        ) from error
