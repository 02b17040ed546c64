"""Federated LoRA fine-tuning on the Hugging Face stack.

Importing this package is instant: a public name loads its module, and torch with it, when it is first used (PEP 562).
"""
# SPDX-License-Identifier: Apache-2.0

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedlora_hf.launch.quiet import silence

__version__ = "0.1.0"

_HOME = {
    "FederatedConfig": "config",
    "FederatedTrainer": "trainer",
    "DirMagLoraConfig": "dirmag",
    "aggregate": "aggregation",
    "load_run": "hub",
    "register_method": "methods",
}
__all__ = ["DirMagLoraConfig", "FederatedConfig", "FederatedTrainer", "aggregate", "load_run", "register_method"]

if TYPE_CHECKING:
    from fedlora_hf.aggregation import aggregate
    from fedlora_hf.config import FederatedConfig
    from fedlora_hf.dirmag import DirMagLoraConfig
    from fedlora_hf.hub import load_run
    from fedlora_hf.methods import register_method
    from fedlora_hf.trainer import FederatedTrainer

silence()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
