"""Which node speaks for which client: asked once of every node, and not believed when another already does."""
# SPDX-License-Identifier: Apache-2.0

import logging
import time
from collections.abc import Callable, Iterable

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedlora_hf.errors import RoundError
from fedlora_hf.flower.exchange import Reply, exchange
from fedlora_hf.util.names import unfit_reason

logger = logging.getLogger("flwr")
# Seconds a node has to say who it is, and after which a node that did not say is asked again. The first message of a
# run starts processes that import torch.
HELLO, AGAIN = 120.0, 30.0


class Roster:
    """nodes: {client id: node id}. refused: {node id: reason} of nodes that speak for nobody."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.nodes: dict[str, int] = {}
        self.refused: dict[int, str] = {}
        self._silent: dict[int, float] = {}

    def wait(self, least: int, seconds: float) -> None:
        """Ask new nodes until `least` clients are there; RoundError when they do not come in time."""
        end = time.monotonic() + seconds
        while len(online := self.online()) < least:
            if time.monotonic() > end:
                refusals = "; ".join(f"node {node}: {reason}" for node, reason in list(self.refused.items())[:3])
                raise RoundError(
                    f"{len(online)} clients answered within {seconds:g} s, min_nodes={least}; start more SuperNodes or "
                    f"lower min_nodes{f' ({refusals})' if refusals else ''}"
                )
            time.sleep(0.2)

    def online(self) -> list[str]:
        """Sorted ids of the clients whose nodes are connected now; nodes not met before are asked who they are."""
        here = set(self.grid.get_node_ids())
        silent = {node for node, since in self._silent.items() if time.monotonic() - since < AGAIN}
        unknown = here - {*self.nodes.values(), *self.refused} - silent
        questions = [
            Message(RecordDict({"config": ConfigRecord({})}), dst_node_id=node, message_type=MessageType.QUERY)
            for node in sorted(unknown)
        ]
        for reply in exchange(self.grid, questions, HELLO):
            self._admit(reply, here)
        return sorted(client for client, node in self.nodes.items() if node in here)

    def _admit(self, reply: Reply, here: set[int]) -> None:
        """Enter a node under the client it names, unless the name is unfit or another connected node has it."""
        if reply.content is None:
            logger.warning("node %d does not say who it is: %s", reply.node, reply.failure)
            self._silent[reply.node] = time.monotonic()
            return
        config = reply.content.get("config")
        client = config.get("client_id") if isinstance(config, ConfigRecord) else None
        reason = unfit_reason(client)
        if reason is None and self.nodes.get(str(client), reply.node) in here - {reply.node}:
            reason = f"client {client!r} is node {self.nodes[str(client)]} already, which is connected"
        if reason is None:
            self.nodes[str(client)] = reply.node
        else:
            logger.warning("node %d is refused: %s", reply.node, reason)
            self.refused[reply.node] = reason


def addressed(
    nodes: dict[str, int], clients: Iterable[str], kind: str, content: Callable[[str], RecordDict], seconds: float
) -> Iterable[Message]:
    """A message for each client's node, made one after the other."""
    for client in clients:
        yield Message(content(client), dst_node_id=nodes[client], message_type=kind, ttl=seconds + 60)
