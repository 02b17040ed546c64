"""Real federation on Flower: clients on machines of their own, any method of ours on the server.

`client_app.app` and `server_app.app` are what a Flower project names (trainers/flower is one that is ready to run).
Flower carries the messages; what is trained, and how updates are aggregated, is the code of `fedlora train`.
`ClairStrategy` and `MethodStrategy` are for who has a ServerApp and ClientApps already; see docs/flower.md.
"""
# SPDX-License-Identifier: Apache-2.0

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlora_hf.flower.strategy import ClairStrategy, MethodStrategy, Verdict

__all__ = ["ClairStrategy", "MethodStrategy", "Verdict"]


def __getattr__(name: str) -> Any:
    """Load the strategies when they are named: a ClientApp's process, new for each message, needs none of them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fedlora_hf.flower import strategy

    return getattr(strategy, name)
