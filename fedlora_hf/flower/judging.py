"""Clients as judges: they are sent adapters of a round and answer with the losses these have on their validation data.

An adapter goes out exact, as whole tensors, under a number instead of a client's name: `judged0`, `judged1` ... What a
judge answers is a claim: losses from 0 to BROKEN under the very numbers it was asked for, or nothing of it counts.
"""
# SPDX-License-Identifier: Apache-2.0

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

from flwr.app import MessageType, MetricRecord, RecordDict

from fedlora_hf.errors import UpdateError, one_line
from fedlora_hf.flower.exchange import Reply
from fedlora_hf.flower.wire import put, take
from fedlora_hf.numerics.evidence import Evidence
from fedlora_hf.rounds.judges import BROKEN, judged
from fedlora_hf.update import AdapterState

logger = logging.getLogger("flwr")

JUDGE = f"{MessageType.EVALUATE}.judge"
NAME, LOSSES = "judged", "losses"
# Adapters in one message: a message starts a process on the node, and lies in the SuperLink's memory [our choice].
AT_ONCE = 8

# Sends each client its order, gives the replies as they come: FlowerTransport.talk.
Talk = Callable[[Sequence[str], str, Callable[[str], RecordDict]], Iterator[tuple[str, Reply]]]


class Judged:
    """What judges said. losses: {judge: {key: loss, nats}}, only of those who scored all that they were asked to.
    down: {judge: bytes of the tensors it was sent}. dropped: {judge: why nothing of it counts}."""

    def __init__(self, judges: Sequence[str]) -> None:
        self.losses: dict[str, dict[str, float]] = {judge: {} for judge in judges}
        self.down = dict.fromkeys(judges, 0)
        self.dropped: dict[str, str] = {}

    def drop(self, judge: str, reason: str) -> None:
        self.losses.pop(judge, None)
        self.dropped[judge] = reason


def asked(talk: Talk, judges: Sequence[str], adapters: Mapping[str, AdapterState]) -> Judged:
    """Have every judge score these adapters, AT_ONCE in a message; a judge's own, under its id, it is not sent.

    adapters: read when a message is made. A judge is asked for nothing more once it was dropped.
    """
    found, keys = Judged(judges), list(adapters)
    for first in range(0, len(keys), AT_ONCE):
        part = {str(first + place): key for place, key in enumerate(keys[first : first + AT_ONCE])}

        def order(judge: str, part: Mapping[str, str] = part) -> RecordDict:
            content = RecordDict()
            for number, key in part.items():
                if key != judge:
                    found.down[judge] += put(content, f"{NAME}{number}", adapters[key].in_memory())
            return content

        for judge, reply in talk([judge for judge in judges if judge in found.losses], JUDGE, order):
            try:
                mine = {number: key for number, key in part.items() if key != judge}
                found.losses[judge] |= read_losses(reply, mine)
            except UpdateError as error:
                found.drop(judge, one_line(error, 300))
                logger.warning("client %s is no judge of this round: %s", judge, found.dropped[judge])
    return found


def read_losses(reply: Reply, part: Mapping[str, str]) -> dict[str, float]:
    """{key: loss} that a judge answered with; UpdateError, one line, unless it is a loss for each and nothing else.

    part: {number: key} of what it was asked for.
    """
    if reply.content is None:
        raise UpdateError(f"node {reply.node}: {reply.failure}")
    said = reply.content.get(LOSSES)
    if not isinstance(said, MetricRecord) or set(said) != set(part):
        count = len(said) if isinstance(said, MetricRecord) else 0
        raise UpdateError(f"{count} losses for {len(part)} adapters: must be one for each it was sent, and no other")
    for number, loss in said.items():
        plain = isinstance(loss, int | float) and not isinstance(loss, bool)
        if not plain or not 0 <= loss <= BROKEN:  # type: ignore[operator]  # NaN is not either
            raise UpdateError(f"loss of adapter {number} is {one_line(loss, 24)}: must be from 0 to {BROKEN:g}")
    return {key: float(said[number]) for number, key in part.items()}  # type: ignore[arg-type]


def evidence_of(losses: Mapping[str, Mapping[str, float]], clients: Sequence[str]) -> dict[str, Evidence]:
    """Functional evidence from {judge: {client, or "" for the round's start: loss}}."""
    scores = dict.fromkeys(clients, Evidence(0.0, None))
    changes = {}
    for client in clients:
        if effects := [row[client] - row[""] for row in losses.values() if client in row]:
            changes[client] = median(effects)
    return scores | (judged(changes, median(row[""] for row in losses.values())) if len(changes) >= 3 else {})


def scored(content: RecordDict, score: Callable[[AdapterState], float]) -> RecordDict:
    """The judge's side: the losses of all adapters in a message. score: the loss of an adapter on its own data."""
    names = [name.removesuffix(".arrays") for name in content if name.startswith(NAME) and name.endswith(".arrays")]
    logger.info("this node scores %d adapters that other clients trained, and could keep a copy of them", len(names))
    found = {name.removeprefix(NAME): score(take(content, name)) for name in names}
    losses = {number: BROKEN if math.isnan(loss) else min(loss, BROKEN) for number, loss in found.items()}
    return RecordDict({LOSSES: MetricRecord({**losses})})
