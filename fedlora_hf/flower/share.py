"""What of an adapter travels: what a stage trains and the method shares. The rest is put back where it arrives.

What a client keeps for itself (fedsa: B) never leaves its node: it lies in `Context.state`, Flower's place for that,
which lasts for a run, as long as the SuperNode lives.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Container, Iterable

import torch
from flwr.app import RecordDict

from fedlora_hf.aggregation.soundness import unsound_state
from fedlora_hf.errors import UpdateError
from fedlora_hf.flower.wire import holds, put, take
from fedlora_hf.methods.method import Method
from fedlora_hf.training.stages import FACTORS, Stage
from fedlora_hf.update import AdapterState

KEPT = "kept"


def travelling(stage: Stage, keeps: Container[str]) -> tuple[str, ...]:
    """The factors that clients send: something of them is trained, and they are not the client's own."""
    return tuple(factor for factor in FACTORS if factor not in stage.untrained and factor not in keeps)


def global_adapter(method: Method) -> str:
    """What the global adapter of a method is whose clients keep something for themselves: for terminal and card."""
    kept = " and ".join(method.keeps)
    rest = [factor for factor in FACTORS if factor not in method.keeps]
    began = f"the {kept} that the run began with"
    found = f"the mean of the clients' {rest[0]} with {began}" if rest else began
    zero = " (B is 0 at first: without an initial adapter it changes nothing of what the base model says)"
    own = f"clients' own {kept} stay on their nodes, in their personal adapters"
    return f"{found}{zero if 'B' in method.keeps else ''}: {own}"


def changed(state: AdapterState, since: AdapterState) -> tuple[str, ...]:
    """The factors in which two adapters differ, be it in one bit; all of them where ranks or scales do."""
    if any(state[module].rank != since[module].rank or state[module].scale != since[module].scale for module in since):
        return FACTORS
    return tuple(
        factor
        for factor in FACTORS
        if not all(torch.equal(getattr(state[module], factor), getattr(since[module], factor)) for module in since)
    )


def remember(memory: RecordDict, state: AdapterState, keeps: Iterable[str]) -> None:
    """Keep a client's own factors on its node; not those of a training that came to nothing (NaN)."""
    if unsound_state(state) is None:
        put(memory, KEPT, AdapterState(state, {}), factors=tuple(keeps))


def with_remembered(state: AdapterState, memory: RecordDict, keeps: Iterable[str]) -> AdapterState:
    """`state` with the factors put back that its node keeps; as it is where the node has none."""
    if not holds(memory, KEPT):
        return state
    return AdapterState(take(memory, KEPT, tuple(keeps), state), state.extras)


def check_rank(state: AdapterState, start: AdapterState, untrained: Iterable[str]) -> None:
    """Raise UpdateError for an update of another rank where the factors not trained must be the same for all."""
    common = "".join(untrained)
    odd = next((module for module in state if common and state[module].rank != start[module].rank), None)
    if odd is not None:
        raise UpdateError(
            f"{odd}: rank {state[odd].rank}, must be {start[odd].rank}: {common} was not trained and is common to all; "
            "give the node the run's lora_r"
        )
