"""A Grid without a network, whose nodes are ClientApps called at once; runs over it and by `fedlora train`."""
# SPDX-License-Identifier: Apache-2.0

import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedlora_hf.flags import parse
from fedlora_hf.flower.client_app import client_app
from fedlora_hf.flower.federate import FlowerRun
from fedlora_hf.flower.settings import read
from fedlora_hf.loading import prepare
from fedlora_hf.rounds.federation import Run
from fedlora_hf.trainer import FederatedTrainer

Config = dict[str, Any]
Change = Callable[[int, Message], Message]
# Node 100 + n is partition n, which is client n in the order of the names.
NODES = {100 + place: {"partition-id": place, "num-partitions": 4} for place in range(4)}


class LocalGrid(Grid):
    """nodes: {node id: its configuration}. run: the run's configuration. change: what a node does to its reply, and
    may raise. app: what the nodes run, default ours. Messages to a node in `gone` come back as Flower's error 5."""

    def __init__(
        self,
        nodes: Mapping[int, Mapping[str, Any]],
        run: Mapping[str, Any],
        change: Change = lambda node, reply: reply,
        app: ClientApp | None = None,
    ) -> None:
        self.nodes, self.config, self.change = dict(nodes), dict(run), change
        self.gone: set[int] = set()
        self.mute: set[int] = set()
        self.sent: list[tuple[int, str]] = []
        self.memory: dict[int, RecordDict] = {}  # what each node keeps of the run, as Flower's Context.state
        self._replies: dict[str, Message] = {}
        self._app = app or client_app()

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str:
        node, name = message.metadata.dst_node_id, str(uuid.uuid4())
        message.metadata.__dict__["_message_id"] = name
        self.sent.append((node, message.metadata.message_type))
        if node not in self.mute:
            self._replies[name] = self._answer(node, message)
        return name

    def _answer(self, node: int, message: Message) -> Message:
        if node in self.gone:
            return Message(Error(5, "Node Unavailable"), reply_to=message)
        memory = self.memory.setdefault(node, RecordDict())
        context = Context(1, node, dict(self.nodes[node]), memory, dict(self.config))
        try:
            return self.change(node, self._app(message, context))
        except Exception as error:
            return Message(Error(2, f"{type(error)}:<'{error}'>"), reply_to=message)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


def run(config: Config, change: Change | None = None, nodes: dict[int, Any] | None = None) -> tuple[Run, LocalGrid]:
    """A run from start to end: where it stands then, and its grid."""
    grid = LocalGrid(nodes or NODES, config, *([change] if change else []))
    return FlowerRun(grid, *read(config)).train(), grid


def plain(config: Mapping[str, Any], folder: Path, *more: str) -> Any:
    """`fedlora train` with the same options, in `folder`; its trainer."""
    own = {"output_dir", "min_nodes", "flags", "wire_dtype"}
    flags = [f"--{name}={value}" for name, value in config.items() if name not in own]
    args = parse([*flags, *config["flags"].split(), "--output_dir", str(folder), "--disable_tqdm", "true", *more])
    trainer = FederatedTrainer.of(prepare(args))
    trainer.train()
    return trainer
