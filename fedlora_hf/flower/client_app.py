"""The ClientApp: hands each message to `node`, which is imported when there is something to train.

In Flower's deployment engine every message starts a new process; the first, which only asks who the client is, would
otherwise wait for torch and transformers as well.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Sequence
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlora_hf.launch.collecting import not_collecting


def _node() -> Any:
    """The module that does the work. The process is Flower's for this app, so nobody else's objects are about."""
    with not_collecting(own_process=True):
        from fedlora_hf.flower import node
    return node


def client_app(mods: Sequence[Any] = ()) -> ClientApp:
    """A ClientApp of ours; `mods` are Flower's, around every message."""
    app = ClientApp(mods=list(mods))

    @app.query()
    def hello(message: Message, context: Context) -> Message:
        """Which client this node speaks for."""
        if "client_id" in context.node_config:
            name = str(context.node_config["client_id"])
        else:
            name = _node().client_id(context.run_config, context.node_config)
        return Message(RecordDict({"config": ConfigRecord({"client_id": name})}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(_node().train(message.content, context), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(_node().evaluate(message.content, context), reply_to=message)

    @app.evaluate("judge")
    def judge(message: Message, context: Context) -> Message:
        return Message(_node().judge(message.content, context), reply_to=message)

    return app


app = client_app()
