"""What a SuperNode does: train, score and personalise one client on its own data, with the code of `fedlora train`.

The process may be a new one for each message. What cannot be made again, the factors that a method lets a client keep
for itself, lies in `Context.state`.
"""
# SPDX-License-Identifier: Apache-2.0

import logging
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, MetricRecord, RecordDict

from fedlora_hf.adapter.files import write_adapter
from fedlora_hf.adapter.slot import AdapterSlot, peft_config, with_adapter
from fedlora_hf.config import SERVER_SIDE, FederatedConfig
from fedlora_hf.data.prepare import divided
from fedlora_hf.data.several import Loaded
from fedlora_hf.errors import ConfigError
from fedlora_hf.flower import judging
from fedlora_hf.flower.feedback import RESIDUAL, carries, put_update
from fedlora_hf.flower.held import holdings, restored
from fedlora_hf.flower.settings import Settings, Value, read
from fedlora_hf.flower.share import KEPT, changed, remember, travelling, with_remembered
from fedlora_hf.flower.wire import SCAFFOLD, holds, in_rank, put, put_tensors, take, take_tensors
from fedlora_hf.loading import limited, load_base, load_data
from fedlora_hf.methods import method_named
from fedlora_hf.methods.method import Method
from fedlora_hf.training.client_trainer import ClientTrainer
from fedlora_hf.training.control import Controls
from fedlora_hf.training.stages import round_stage
from fedlora_hf.update import AdapterState

logger = logging.getLogger("flwr")
# Keys of a node's own configuration that are no flag; every other key overrides the run's flag of that name.
NODE_KEYS = ("client_id", "personal_dir", "keep_personal", "judging", "partition-id", "num-partitions")
Items = tuple[tuple[str, Value], ...]


def client_id(run: Mapping[str, Value], node: Mapping[str, Value]) -> str:
    """The client a node speaks for: its own `client_id`, or, in a simulation, a part of the run's dataset."""
    if "client_id" in node:
        return str(node["client_id"])
    names, place = sorted(_clients(_items(run, node))), node.get("partition-id")
    if not isinstance(place, int) or not place < len(names):
        raise ConfigError(
            f"partition-id={place!r}: the dataset has {len(names)} clients; give the node a client_id and a dataset"
        )
    return names[place]


def train(content: RecordDict, context: Context) -> RecordDict:
    """One client's local training in a round. content: "start", maybe "frozen", and {"round", "score"}; the reply has
    "update", {"train_loss", "steps", "num_examples"} and, if asked to score, the start's metrics.

    The update has the factors that were trained and are shared; {"fresh"} says whether the client's own were not here,
    {"fresh_residual"} whether what rounding lost before was not, {"holds"} what the next message may build on. A node
    that has lost what this message builds on answers {"lacks"}, and nothing else.
    """
    if not restored(content, context.state):
        return _lacking()
    name, trainer, settings = _at_work(context.run_config, context.node_config)
    order: Any = content["config"]
    method = method_named(trainer.args.aggregation)
    if judges := order.get("judges"):
        _may_judge(context.node_config)
        logger.warning("%s: up to %d other clients are sent its update to score, and could keep it", name, judges)
    memory = context.state
    fresh = {"fresh": not holds(memory, KEPT), "fresh_residual": not holds(memory, RESIDUAL)}
    reply = RecordDict({"config": ConfigRecord({"client_id": name, **_holding(memory), **fresh})})
    _stays(context.node_config, method)  # said now rather than at the end
    sent = take(content, "start")
    start = with_remembered(fit(sent, trainer), memory, method.keeps)
    before = trainer.test_metrics({name: start}).get(name, {}) if order["score"] else {}
    frozen, number = take(content, "frozen") if holds(content, "frozen") else None, int(order["round"])
    controls = None
    if order.get("scaffold"):
        controls = Controls(take_tensors(content, SCAFFOLD), take_tensors(memory, SCAFFOLD))
    update = trainer.train_round(name, start, frozen, number, controls)
    stage = round_stage(trainer.args, method.trained(number), number)
    if controls is not None:
        put_tensors(memory, SCAFFOLD, update.control)
        put_tensors(reply, SCAFFOLD, update.control)
    if method.keeps:
        remember(memory, update.state, method.keeps)
    shared, lost = travelling(stage, method.keeps), memory if carries(method) else None
    put_update(reply, update.state, sent, settings.wire_dtype, shared, lost)
    reply["facts"] = MetricRecord({**update.metrics, "num_examples": int(update.num_examples or 0)})
    reply["before"] = MetricRecord(dict(before))
    return reply


def evaluate(content: RecordDict, context: Context) -> RecordDict:
    """Score the "global" adapter on the client's test split; where asked to, choose a personal adapter and score it.

    content: "global", maybe "own" and "refined", and {"personal"}. The personal adapter is sent back, as far as it is
    not the global one, unless it stays, and written to the node's `personal_dir` if it has one.
    """
    node = context.node_config
    if not restored(content, context.state):
        return _lacking()
    name, trainer, _ = _at_work(context.run_config, node)
    method = method_named(trainer.args.aggregation)
    global_state = headed(take(content, "global"), trainer)
    said: dict[str, Any] = {"client_id": name, **_holding(context.state)}
    reply = RecordDict({"config": ConfigRecord(said)})
    reply["global"] = MetricRecord(dict(trainer.test_metrics({name: global_state}).get(name, {})))
    order: Any = content["config"]
    if order["personal"]:
        own, refined = (
            with_remembered(take(content, kind), context.state, method.keeps) if holds(content, kind) else None
            for kind in ("own", "refined")
        )
        found = trainer.personal_adapter(name, global_state, own, refined)
        state = found.state
        factors = changed(state, global_state)
        reply["config"] = ConfigRecord({**said, "choice": str(found.choice), "factors": "".join(factors)})
        reply["losses"] = MetricRecord({**found.losses_by_name()})
        reply["personalised"] = MetricRecord(dict(trainer.test_metrics({name: state}).get(name, {})))
        if "personal_dir" in node:
            write_adapter(Path(str(node["personal_dir"])), state.in_memory(), trainer.slot.config())
        if not _stays(node, method):
            put(reply, "personal", state, factors=factors)
    return reply


def judge(content: RecordDict, context: Context) -> RecordDict:
    """The losses, on the client's validation split, of adapters that other clients trained: see flower/judging.py."""
    name, trainer, _ = _at_work(context.run_config, context.node_config)
    _may_judge(context.node_config)
    own = trainer.clients[name].validation
    if own is None or not len(own):
        raise ConfigError("validation_fraction=0: this node has no validation data to judge with; give it some")
    rows, owners = [own[place] for place in range(len(own))], [name] * len(own)
    return judging.scored(
        content, len(own), lambda state: trainer.scorer.losses(headed(state, trainer), rows, owners)[name]
    )


def _may_judge(node: Mapping[str, Value]) -> None:
    """ConfigError where a node's own configuration is against judging and being judged."""
    if not node.get("judging", True):
        raise ConfigError(
            "judging=false: this run sends a client's updates to other clients to score; the run must leave "
            "functional_judges out, or the node this key"
        )


def _holding(memory: RecordDict) -> dict[str, Any]:
    """What the next message may build on, for an answer; a list without items has no type in a message."""
    held = holdings(memory)
    return {"holds": held} if held else {}


def _lacking() -> RecordDict:
    """The answer to changes against what is not here any more."""
    return RecordDict({"config": ConfigRecord({"lacks": True})})


def _stays(node: Mapping[str, Value], method: Method) -> bool:
    """Whether the personal adapter stays on the node: if its `keep_personal` says so.

    Where the method lets clients keep a factor for themselves, which is in it, that is the default of nodes with a name
    of their own (a simulation's have none); ConfigError if it would then be lost.
    """
    own = bool(method.keeps) and "client_id" in node
    if own and node.get("keep_personal", True) and "personal_dir" not in node:
        raise ConfigError(
            f"personal_dir is missing: with {method.name} a personal adapter stays on its node; give the node one, or "
            "keep_personal=false"
        )
    return bool(node.get("keep_personal", own))


def fit(state: AdapterState, trainer: ClientTrainer) -> AdapterState:
    """`state` in the rank of the client's own adapter: truncated when it is larger, padded when it is smaller."""
    factors = {
        module: in_rank(both, trainer.rank, trainer.initial[module].scale if module in trainer.initial else both.scale)
        for module, both in state.items()
    }
    return headed(AdapterState(factors, state.extras), trainer)


def headed(state: AdapterState, trainer: ClientTrainer) -> AdapterState:
    """`state` with the head that the base model was loaded with where it has none: the server knows it from round 1 on.

    It is the same on every node: the checkpoint's, or drawn from the run's seed.
    """
    return AdapterState(state, {**trainer.initial.extras, **state.extras})


def _at_work(run: Mapping[str, Value], node: Mapping[str, Value]) -> tuple[str, ClientTrainer, Settings]:
    """(client, its trainer, settings); the base model is loaded once a process, the trainer made for each message."""
    name, items = client_id(run, node), _items(run, node)
    args, settings = _options(items)
    model, tokenizer, initial, max_length = _model(items)
    args = limited(args, max_length)
    splits = _own_clients(items, name) if "client_id" in node else _clients(items)
    trainer = ClientTrainer(model, args, {name: splits[name]}, processing_class=tokenizer)
    trainer.initial = initial  # what is in the model now, an earlier message has left there
    return name, trainer, settings


def _items(run: Mapping[str, Value], node: Mapping[str, Value]) -> Items:
    """The configuration a node works by, as a key of caches: the run's, without the server's, under the node's own."""
    own = {name: value for name, value in node.items() if name not in NODE_KEYS}
    if odd := sorted(SERVER_SIDE & own.keys()):
        raise ConfigError(f"{odd[0]}={own[odd[0]]!r}: is the server's alone, and has no effect on a node; leave it out")
    theirs = {name: value for name, value in run.items() if name not in SERVER_SIDE}
    return tuple(sorted({**theirs, **own}.items()))


@lru_cache(maxsize=1)
def _options(items: Items) -> tuple[FederatedConfig, Settings]:
    # Trainer wants a folder; nothing is written there.
    return read({**dict(items), "output_dir": tempfile.gettempdir(), "disable_tqdm": True, "report_to": "none"})


@lru_cache(maxsize=1)
def _model(items: Items) -> tuple[Any, Any, AdapterState, int]:
    """The model with its adapter, the tokenizer, the adapter as it was made, and the longest sequence in tokens."""
    args, _ = _options(items)
    base, tokenizer, max_length = load_base(args, args.labels if args.task == "sequence_classification" else None)
    model = with_adapter(base, peft_config(args), args.seed)
    return model, tokenizer, AdapterSlot(model).read(), max_length


@lru_cache(maxsize=1)
def _clients(items: Items) -> dict[str, Any]:
    """The run's dataset, divided as `fedlora train` divides it."""
    args, _ = _options(items)
    return divided(args, _examples(args), args.partition_by)


@lru_cache(maxsize=1)
def _own_clients(items: Items, name: str) -> dict[str, Any]:
    """{name: splits} of the node's own dataset, as `fedlora train --partition_by client` splits that client's."""
    args, _ = _options(items)
    loaded = _examples(args)
    train, validation, test = (_named(part, name) for part in loaded[:3])
    return divided(args, Loaded(train, validation, test, several=False), "client")


def _named(examples: Any, name: str) -> Any:
    """Examples of one client; None stays None."""
    if examples is None:
        return None
    if "client" in examples.column_names:
        examples = examples.remove_columns("client")
    return examples.add_column("client", [name] * len(examples))


def _examples(args: FederatedConfig) -> Loaded:
    if not args.dataset:
        raise ConfigError("dataset is missing: give the node its own, dataset='/path/data.jsonl' in its --node-config")
    return load_data(args)
