"""The Hub: adapters out, adapters in, and the model card. Nothing here knows a model or a Trainer, nor imports torch.

Names load on first use, so that rendering a card needs no Hub client's network code and importing costs nothing.
"""
# SPDX-License-Identifier: Apache-2.0

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "BackgroundPusher": "background",
    "render_card": "card",
    "write_card": "card",
    "Source": "pull",
    "fetch_adapter": "pull",
    "fetch_run": "pull",
    "load_run": "pull",
    "parse_source": "pull",
    "push_folder": "push",
}
__all__ = [
    "BackgroundPusher",
    "Source",
    "fetch_adapter",
    "fetch_run",
    "load_run",
    "parse_source",
    "push_folder",
    "render_card",
    "write_card",
]

if TYPE_CHECKING:
    from fedlora_hf.hub.background import BackgroundPusher
    from fedlora_hf.hub.card import render_card, write_card
    from fedlora_hf.hub.pull import Source, fetch_adapter, fetch_run, load_run, parse_source
    from fedlora_hf.hub.push import push_folder


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
