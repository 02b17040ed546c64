"""Which node speaks for which client: asked of every node, and believed as far as what is known allows.

With a roster file a name is bound to a node, and nobody else gets it. Without one nothing tells an impostor from the
client it names, so the rule is only that nothing is taken away: a name stays with the node that had it first, for the
whole run and where it is resumed, be that node connected or not. One exception: before a client's first update its
name is a mere claim, and goes to a node that disputed it while both were connected, once the first one has gone.
"""
# SPDX-License-Identifier: Apache-2.0

import logging
import time
from collections.abc import Callable, Iterable, Mapping

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedlora_hf.errors import RoundError
from fedlora_hf.flower.exchange import Reply, exchange
from fedlora_hf.util.names import NameBook, unfit_reason

logger = logging.getLogger("flwr")
# Seconds a node has to say who it is, and after which a node that did not say, or was refused, is asked again; twice as
# long each time. The first message of a run starts processes that import torch.
HELLO, AGAIN, LONGEST = 120.0, 30.0, 3600.0


class Roster:
    """nodes: {client id: node id}. refused: {node id: reason} of nodes that speak for nobody.

    bound: {node id: client id} of the roster file, None without one. anew: names of nodes that were clients before the
    run went on, and have not been seen since, are free. proved: clients that have sent an update.
    """

    def __init__(self, grid: Grid, bound: Mapping[int, str] | None = None, *, anew: bool = False) -> None:
        self.grid, self.bound, self.anew = grid, bound, anew
        self.nodes: dict[str, int] = {}
        self.refused: dict[int, str] = {}
        self.proved: set[str] = set()
        self._names = NameBook()
        self._met: set[int] = set()  # nodes that were connected at some time
        self._disputed: dict[str, list[int]] = {}
        self._asked: dict[int, tuple[int, float]] = {}  # of nodes that speak for nobody: (how often, when last)

    def remember(self, nodes: Mapping[str, int]) -> None:
        """Keep the names of a run that goes on: each is its node's, as the record has it."""
        for client, node in nodes.items():
            if self.bound is None or self.bound.get(node) == client:
                self._enter(client, node)
        self.proved |= set(nodes)

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
        """Sorted ids of the clients whose nodes are connected now; the others are asked who they are, if it is time."""
        here = set(self.grid.get_node_ids())
        self._met |= here
        unknown = here - set(self.nodes.values())
        if self.bound is not None:
            for node in sorted(unknown - set(self.bound) - set(self.refused)):
                self._refuse(node, "is not in the roster; add it there if it belongs to this federation")
            unknown &= set(self.bound)
        questions = [
            Message(RecordDict({"config": ConfigRecord({})}), dst_node_id=node, message_type=MessageType.QUERY)
            for node in sorted(unknown)
            if self._is_time(node, here)
        ]
        for reply in exchange(self.grid, questions, HELLO):
            self._admit(reply, here)
        return sorted(client for client, node in self.nodes.items() if node in here)

    def _is_time(self, node: int, here: set[int]) -> bool:
        """Whether a node is to be asked: never before, not for long, or what stood in its way has gone."""
        times, last = self._asked.get(node, (0, 0.0))
        if not times or any(self._may_inherit(client, node, here) for client in self._disputed):
            return True
        return time.monotonic() - last >= min(AGAIN * 2.0 ** (times - 1), LONGEST)

    def _may_inherit(self, client: str, node: int, here: set[int]) -> bool:
        """Whether a name is this node's for the asking: its holder has gone, and had sent no update, or both may."""
        waiting = [other for other in self._disputed.get(client, ()) if other in here]
        free = self.bound is not None or client not in self.proved
        return free and waiting[:1] == [node] and self.nodes[client] not in here

    def _admit(self, reply: Reply, here: set[int]) -> None:
        """Enter a node under the client it names, or note why not."""
        node = reply.node
        self._asked[node] = (self._asked.get(node, (0, 0.0))[0] + 1, time.monotonic())
        if reply.content is None:
            logger.warning("node %d does not say who it is: %s", node, reply.failure)
            return
        config = reply.content.get("config")
        said = config.get("client_id") if isinstance(config, ConfigRecord) else None
        if reason := unfit_reason(said) or self._reason(str(said), node, here):
            self._refuse(node, reason)
        else:
            self._enter(str(said), node)

    def _reason(self, client: str, node: int, here: set[int]) -> str | None:
        """Why a node may not speak for a client, or None."""
        if self.bound is not None and self.bound[node] != client:
            return f"says it is client {client!r}, but the roster has it as {self.bound[node]!r}; mend one of the two"
        if reason := self._names.clash(client):
            return reason
        holder = self.nodes.get(client, node)
        free = holder not in here and (self.bound is not None or (self.anew and holder not in self._met))
        if holder == node or free or self._may_inherit(client, node, here):
            return None
        if holder in here:
            if node not in self._disputed.setdefault(client, []):
                self._disputed[client].append(node)
            return f"client {client!r} is node {holder} already, which is connected"
        return f"client {client!r} is node {holder}, which is away and keeps its name; bind it to this one in a roster"

    def _enter(self, client: str, node: int) -> None:
        self.nodes[client] = node
        self._names.add(client)
        self.refused.pop(node, None)
        if node in self._disputed.get(client, ()):
            self._disputed[client].remove(node)

    def _refuse(self, node: int, reason: str) -> None:
        logger.warning("node %d is refused: %s", node, reason)
        self.refused[node] = reason


def addressed(
    nodes: dict[str, int], clients: Iterable[str], kind: str, content: Callable[[str], RecordDict], seconds: float
) -> Iterable[Message]:
    """A message for each client's node, made one after the other."""
    for client in clients:
        yield Message(content(client), dst_node_id=nodes[client], message_type=kind, ttl=seconds + 60)
