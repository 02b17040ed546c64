"""Clients as judges: they are sent adapters of a round and answer with the losses these have on their validation data.

What is judged, and what losses come to, is `rounds/judges.py`, as with `fedlora train`; here is who measures. Adapters
go out exact, as whole tensors, under a number instead of a client's name: `judged0`, `judged1` ... What a judge answers
is a claim: losses from 0 to BROKEN under the very numbers it was asked for, or nothing of it counts.
"""
# SPDX-License-Identifier: Apache-2.0

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from flwr.app import ConfigRecord, MessageType, MetricRecord, RecordDict

from fedlora_hf.errors import UpdateError, one_line
from fedlora_hf.flower.exchange import Reply
from fedlora_hf.flower.replies import config
from fedlora_hf.flower.wire import put, take
from fedlora_hf.record import claims
from fedlora_hf.rounds.federation import Federation
from fedlora_hf.rounds.judges import BROKEN, Functional, bounded, functional_evidence, mixture
from fedlora_hf.rounds.judging import seed_of
from fedlora_hf.rounds.panel import Split, drawn
from fedlora_hf.rounds.transport import Ask
from fedlora_hf.update import AdapterState

logger = logging.getLogger("flwr")

JUDGE = f"{MessageType.EVALUATE}.judge"
NAME, LOSSES = "judged", "losses"
# Adapters in one message: a message starts a process on the node, and lies in the SuperLink's memory [our choice].
AT_ONCE = 8
# Besides one for every client: the round's start, its mean, and the mean diluted with the start.
START, MEAN, DILUTED = 0, 1, 2

Key = str | int  # a client's id, or one of the three
# Sends each client its order, gives the replies as they come: FlowerTransport._talk.
Talk = Callable[[Sequence[str], str, Callable[[str], RecordDict]], Iterator[tuple[str, Reply]]]


class Judged:
    """What judges said. losses: {judge: {key: loss, nats}}, only of those who scored all that they were asked to.
    examples: {judge: on how many, as it says}. down: {judge: bytes of the tensors it was sent}. dropped: {judge: why
    nothing of it counts}."""

    def __init__(self, judges: Sequence[str]) -> None:
        self.losses: dict[str, dict[Key, float]] = {judge: {} for judge in judges}
        self.examples: dict[str, int] = {}
        self.down = dict.fromkeys(judges, 0)
        self.dropped: dict[str, str] = {}

    def row(self, key: Key) -> dict[str, float]:
        """{judge: its loss under the adapter of that key}"""
        return {judge: losses[key] for judge, losses in self.losses.items() if key in losses}

    def drop(self, judge: str, reason: str) -> None:
        self.losses.pop(judge, None)
        self.dropped[judge] = reason
        logger.warning("client %s is no judge of this round: %s", judge, reason)


def judged_by_clients(talk: Talk, federation: Federation, ask: Ask, online: Sequence[str]) -> tuple[Functional, Judged]:
    """(functional evidence on the open round's updates, what the judges said): by `functional_judges` + 1 clients of
    the cohort, drawn anew each round; those of no influence are not asked.

    online: clients whose nodes are connected.
    """
    updates = {update.client_id: update for update in federation.updates(ask.number, ask.cohort)}
    found = federation.combined(ask.run.record, ask.number, ask.cohort)
    sound, mean = [client for client in updates if client in found.influence], found.state
    able = {client: Split(1, 0.0) for client in sound if client in online}
    count = int(federation.args.functional_judges or 0) + 1
    panel = drawn(able, count, seed_of(federation.args, ask.number))
    heard = [judge for judge in panel if found.influence.get(judge, 0.0) > 0]

    def adapter(key: Key) -> AdapterState:
        if isinstance(key, str):
            return mixture(mean, updates[key].state.in_memory())
        return ask.run.state if key == START else mean if key == MEAN else mixture(mean, ask.run.state)

    said = asked(talk, heard, [START, MEAN, DILUTED, *sound], adapter)
    mixed = {client: said.row(client) for client in sound}
    evidence = functional_evidence(said.row(START), said.row(MEAN), said.row(DILUTED), mixed, found.influence)
    heard = sorted(said.losses)
    facts = {
        "judges": {judge: said.examples[judge] for judge in heard},
        "weights": {judge: found.influence[judge] for judge in heard},
        "bytes_down": said.down,
    }
    return replace(evidence, facts=facts), said


def asked(talk: Talk, judges: Sequence[str], keys: Sequence[Key], adapter: Callable[[Key], AdapterState]) -> Judged:
    """Have every judge score the adapters of these keys, AT_ONCE in a message; what stands under its own id it is not
    sent. A judge is asked for nothing more once it was dropped.

    adapter: the adapter of a key; made once for all judges.
    """
    found = Judged(judges)
    for first in range(0, len(keys), AT_ONCE):
        part = {str(first + place): key for place, key in enumerate(keys[first : first + AT_ONCE])}
        states = {number: (key, adapter(key)) for number, key in part.items()} if found.losses else {}

        def order(judge: str, states: Mapping[str, tuple[Key, AdapterState]] = states) -> RecordDict:
            content = RecordDict()
            for number, (key, state) in states.items():
                if key != judge:
                    found.down[judge] += put(content, f"{NAME}{number}", state)
            return content

        for judge, reply in talk(list(found.losses), JUDGE, order):
            try:
                mine = {number: key for number, key in part.items() if key != judge}
                found.losses[judge] |= read_losses(reply, mine)
                found.examples[judge] = claims.count(config(reply).get("examples"))
            except UpdateError as error:
                found.drop(judge, one_line(error, 300))
    return found


def read_losses(reply: Reply, part: Mapping[str, Key]) -> dict[Key, float]:
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


def scored(content: RecordDict, examples: int, score: Callable[[AdapterState], float]) -> RecordDict:
    """The judge's side: the losses of all adapters in a message. score: the loss of one on its own data, `examples`."""
    names = [name.removesuffix(".arrays") for name in content if name.startswith(NAME) and name.endswith(".arrays")]
    logger.warning("this node scores %d adapters made of other clients' updates, and could keep a copy", len(names))
    losses = {name.removeprefix(NAME): bounded(score(take(content, name))) for name in names}
    return RecordDict({LOSSES: MetricRecord({**losses}), "config": ConfigRecord({"examples": examples})})
