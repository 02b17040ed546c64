"""What a node's reply says, read with care: an update that can be used, plain numbers, words and flags."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping, Sequence

from flwr.app import ConfigRecord, MetricRecord
from torch import Tensor

from fedlora_hf.aggregation.screening import Shapes, examine, mismatch
from fedlora_hf.aggregation.soundness import unsound
from fedlora_hf.errors import UpdateError, one_line
from fedlora_hf.flower.exchange import Reply
from fedlora_hf.flower.wire import take
from fedlora_hf.training.stages import FACTORS
from fedlora_hf.update import AdapterState, ClientUpdate

MAX_METRICS = 32  # of one kind, in one reply


def received(
    client: str, reply: Reply, factors: Sequence[str], start: AdapterState
) -> tuple[ClientUpdate, dict[str, float]]:
    """(a client's update, the metrics of its start) in a reply; UpdateError, one line, for one that cannot be used.

    factors: those that the client sends; the others are those of `start`, where it began.
    """
    if reply.content is None:
        raise UpdateError(f"node {reply.node}: {reply.failure}")
    facts = metrics(reply, "facts")
    examples = facts.pop("num_examples", 0)
    state = take(reply.content, "update", factors, None if set(factors) == set(FACTORS) else start)
    return ClientUpdate(client, state, int(examples), facts), metrics(reply, "before")


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


def metrics(reply: Reply, name: str) -> dict[str, float]:
    """The plain numbers of that name in a reply; {} where there are none."""
    found = reply.content.get(name) if reply.content is not None else None
    if not isinstance(found, MetricRecord):
        return {}
    plain = {one_line(key, 80): value for key, value in found.items() if isinstance(value, int | float)}
    return dict(list(plain.items())[:MAX_METRICS])
