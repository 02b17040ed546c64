"""`fedlora methods`: the aggregation methods, or one of them with its options and its paper. Needs no torch."""
# SPDX-License-Identifier: Apache-2.0

import inspect
import textwrap
from dataclasses import fields
from typing import get_type_hints

from fedlora_hf.methods import METHODS, method_named
from fedlora_hf.methods.method import SAID, Method
from fedlora_hf.methods.settings import type_text

WIDTH = 100


def describe(name: str | None = None) -> str:
    """All methods, a few lines each; or all that is to be known of one, for `fedlora methods NAME`.

    Raises ConfigError for a name that is none of them.
    """
    if name is not None:
        return _whole(method_named(name))
    listing = "\n".join(_brief(method) for method in METHODS.values())
    return f"{listing}\n\nfedlora methods NAME tells what a method's options mean.\n"


def _brief(method: Method) -> str:
    options = ", ".join(f"{name}={default}" for name, _, default in _options(method)) or "none"
    lines = [f"{method.name}: {method.title}", f"  paper: {method.paper}", f"  options: {options}"]
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="    ") for line in lines)


def _whole(method: Method) -> str:
    facts = [
        f"averages {'the products B A' if method.averages == 'product' else 'the factors A and B, each by itself'}",
        f"clients train {' and '.join(method.trains)}",
    ]
    facts += [f"each keeps its own {' and '.join(method.keeps)}"] if method.keeps else []
    facts += ["clients start every round from fresh factors"] if method.restarts else []
    facts += ["made to withstand contaminated clients"] if method.robust else []
    facts += [SAID[method.counts]]
    facts += [f"the global adapter is {method.global_adapter}"] if method.global_adapter else []
    facts += [f"needs {method.least_clients} usable updates"] if method.least_clients > 1 else []
    lines = [f"{method.name}: {method.title}", f"paper: {method.paper}", "; ".join(facts)]
    text = "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in lines)
    options = _options(method)
    if not options:
        return f"{text}\noptions: none\n"
    listing = "\n".join(f"  {name}={default}  ({kind})" for name, kind, default in options)
    meaning = textwrap.indent(inspect.getdoc(method.options) or "", "  ")
    usage = " ".join(f"{name}={default}" for name, _, default in options[:2])
    flags = f"--aggregation {method.name} --aggregation_options {usage}"
    return f"{text}\n\noptions, with their defaults:\n{listing}\n\n{meaning}\n\n{flags}\n"


def _options(method: Method) -> list[tuple[str, str, str]]:
    """(name, type, default) of each option, as a user writes them."""
    hints = get_type_hints(method.options)
    return [(item.name, type_text(hints[item.name]), _text(item.default)) for item in fields(method.options)]


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
