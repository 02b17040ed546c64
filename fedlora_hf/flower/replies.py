"""What a node's reply says, read with care: an update that can be used, plain numbers, words and flags."""
# SPDX-License-Identifier: Apache-2.0

import hashlib
from collections.abc import Mapping, Sequence
from itertools import islice

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedlora_hf.aggregation.screening import Shapes, examine, mismatch
from fedlora_hf.aggregation.soundness import unsound
from fedlora_hf.errors import UpdateError
from fedlora_hf.flower.exchange import Reply
from fedlora_hf.flower.held import fingerprint_of
from fedlora_hf.flower.wire import CHANGE, take
from fedlora_hf.record import claims
from fedlora_hf.training.stages import FACTORS
from fedlora_hf.update import AdapterState, ClientUpdate

MAX_NUMBERS = 32  # of one kind, in one reply


def received(client: str, reply: Reply, factors: Sequence[str], start: AdapterState) -> tuple[ClientUpdate, str]:
    """(a client's update, what of its facts was dropped and why); UpdateError, one line, where it cannot be used.

    factors: those that the client sends; the others are those of `start`, where it began, and what it was sent.
    """
    if reply.content is None:
        raise UpdateError(f"node {reply.node}: {reply.failure}")
    said = numbers(reply, "facts")
    examples = claims.count(said.pop("num_examples", None))
    facts, dropped = claims.facts(said)
    state = take(reply.content, "update", factors, None if set(factors) == set(FACTORS) else start, start)
    return ClientUpdate(client, state, examples, facts), dropped


def fingerprint(state: AdapterState, factors: Sequence[str]) -> str:
    """SHA-256 of what a client sent of an adapter, its scales and whole tensors included: 16 bytes of it, as hex."""
    found = hashlib.sha256()

    def add(name: str, tensor: Tensor) -> None:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())

    for module, both in state.items():
        found.update(f"{module} {both.scale!r}\n".encode())
        for factor in factors:
            add(factor, getattr(both, factor))
    for name in sorted(state.extras):
        add(name, state.extras[name])
    return found.hexdigest()[:32]


def sent_fingerprint(content: RecordDict | None, update: ClientUpdate, factors: Sequence[str]) -> str:
    """Fingerprint of what a client sent, as it was sent: of a change itself, whatever it is added to."""
    arrays = content.get("update.arrays") if content is not None else None
    if isinstance(arrays, ArrayRecord) and any(array.stype == CHANGE for array in arrays.values()):
        return fingerprint_of(arrays)
    return fingerprint(update.state, factors)


def check(update: ClientUpdate, shapes: Shapes) -> None:
    """Raise UpdateError for an update that cannot be used, or is not of these shapes."""
    found = examine(update)
    if reason := found if isinstance(found, str) else mismatch(found, shapes, "quarantine"):
        raise UpdateError(reason)


def check_control(control: Mapping[str, Tensor], size: int) -> None:
    """Raise UpdateError for a control variate that is not finite, or not of `size` bytes in float32, as what is trained
    is."""
    if reason := next((f"{name[:80]!r} {why}" for name, t in control.items() if (why := unsound(t))), None):
        raise UpdateError(f"control variate {reason}; use this package's client")
    if sum(4 * tensor.numel() for tensor in control.values()) != size:
        raise UpdateError("control variate of another size than what is trained: with scaffold all have one rank")


def config(reply: Reply) -> Mapping[str, object]:
    """What a reply says in words and flags; {} where it says nothing."""
    found = reply.content.get("config") if reply.content is not None else None
    return found if isinstance(found, ConfigRecord) else {}


def numbers(reply: Reply, name: str) -> dict[str, object]:
    """What a reply says under that name in numbers, unchecked: see `record.claims`; {} where it says nothing."""
    found = reply.content.get(name) if reply.content is not None else None
    return dict(islice(found.items(), MAX_NUMBERS)) if isinstance(found, MetricRecord) else {}
