"""Messages to nodes and their replies, one at a time: the server never holds more than a handful of updates."""
# SPDX-License-Identifier: Apache-2.0

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedlora_hf.errors import one_line

# Seconds between two looks for replies: short at first, because in a simulation they come at once.
_SHORTEST, _LONGEST = 0.02, 1.0
_AT_ONCE = 8
_UNSENT = "the message could not be sent (too large, or the node is not known)"
# What Flower's error codes mean to a person [flwr.common.constant.ErrorCode].
_CODES = {
    1: "its ClientApp could not be loaded",
    2: "its ClientApp raised",
    3: "the message was lost",
    4: "its reply was lost",
    5: "the node is gone",
    8: "its ClientApp process died",
}


class Reply:
    """A node's answer: its content, or why there is none."""

    def __init__(self, node: int, content: RecordDict | None, failure: str | None = None) -> None:
        self.node, self.content, self.failure = node, content, failure


def exchange(
    grid: Grid, messages: Iterable[Message], seconds: float, again: Callable[[Reply], Message | None] | None = None
) -> Iterator[Reply]:
    """Send every message, then give the replies as they come; who has not answered in time has a failure.

    A message is made when it is sent and forgotten then, so `messages` may be a generator. A reply counts for the node
    that its question was sent to: the sender of an error is the SuperLink. again: what is sent in answer to a reply,
    which is then not given; None: nothing is.
    """
    asked: dict[str, int] = {}

    def sent(message: Message) -> bool:
        ids = list(grid.push_messages([message]))
        if ids and ids[0]:
            asked[ids[0]] = message.metadata.dst_node_id
        return bool(ids and ids[0])

    for message in messages:
        if not sent(message):
            yield Reply(message.metadata.dst_node_id, None, _UNSENT)
    end, pause = time.monotonic() + seconds, _SHORTEST
    while asked and time.monotonic() < end:
        came = False
        for ids in list(_in_parts(list(asked))):
            for message in grid.pull_messages(ids):
                question = message.metadata.reply_to_message_id
                if question in asked:
                    came, reply = True, _reply(asked.pop(question), message)
                    further = None if again is None else again(reply)
                    if further is None:
                        yield reply
                    elif not sent(further):
                        yield Reply(reply.node, None, _UNSENT)
        pause = _SHORTEST if came else min(2 * pause, _LONGEST)
        if asked:
            time.sleep(pause)
    for node in asked.values():
        yield Reply(node, None, f"no answer within {seconds:g} s")


def _reply(node: int, message: Message) -> Reply:
    if message.has_error():
        code, reason = message.error.code, one_line(message.error.reason or "")
        return Reply(node, None, f"{_CODES.get(code, f'error {code}')}: {reason}".rstrip(": "))
    return Reply(node, message.content)


def _in_parts(ids: list[str]) -> Iterator[list[str]]:
    rest = iter(ids)
    while part := list(islice(rest, _AT_ONCE)):
        yield part
