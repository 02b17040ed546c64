"""Nodes that lie, send damaged replies or old ones: no run ends, no mean is spoilt, every round can be resumed."""
# SPDX-License-Identifier: Apache-2.0

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from local_grid import NODES, Change, Config, LocalGrid, run

from fedlora_hf.flower.exchange import Reply
from fedlora_hf.flower.federate import FlowerRun
from fedlora_hf.flower.settings import read
from fedlora_hf.rounds.transport import Ask

pytestmark = pytest.mark.usefixtures("as_server", "bare_output")
LIAR = "client-03"


@pytest.fixture
def short(config: Config) -> Config:
    return {**config, "num_rounds": 1, "local_steps": 1}


def says(name: str, numbers: dict[str, Any]) -> Change:
    """Node 103 says other numbers under that name than it should."""

    def change(node: int, reply: Message) -> Message:
        if node == 103 and name in reply.content:
            reply.content[name] = MetricRecord(numbers)
        return reply

    return change


def test_a_bad_start_leaves_rounds_that_can_be_resumed(short: Config) -> None:
    done, _ = run(short, says("before", {"x": 1.0}))
    assert "before" not in done.record.clients[LIAR]["metrics"]
    assert done.record.clients[LIAR]["dropped"] == {"before": "loss is missing"}
    again, _ = run({**short, "num_rounds": 2, "resume_from": "last"})
    assert again.round == 2


@pytest.mark.parametrize(
    "lie",
    [{"loss": -1e300, "token_accuracy": 5.0, "sota_on_mmlu": 0.99}, {"loss": math.nan}, {"a\x1b[31m<b>": math.inf}, {}],
)
def test_a_lie_about_the_evaluation_enters_no_mean(short: Config, lie: dict[str, Any], tmp_path: Path) -> None:
    done, _ = run({**short, "evaluate_rounds": True}, says("global", lie))
    honest = [facts["metrics"]["global"]["loss"] for name, facts in done.record.clients.items() if name != LIAR]
    for means in (done.record.metrics["after"]["global"], done.record.rounds[0]["metrics"]["global"]):
        assert means["loss"] == pytest.approx(sum(honest) / len(honest))
        assert set(means) == {"loss", "perplexity", "token_accuracy"}
    assert ("global" in done.record.clients[LIAR].get("dropped", {})) is bool(lie)
    card = (tmp_path / "flower" / "README.md").read_text()
    assert "self-reported by the clients" in card
    assert "sota" not in card
    told = json.loads((tmp_path / "flower" / "run.json").read_text())
    assert told["data"]["metrics"] == "self-reported by the clients"


@pytest.mark.parametrize("count", [-5, 2.5, math.nan, math.inf, [3], 2**62])
def test_a_count_that_is_none_is_quarantined(short: Config, count: Any) -> None:
    done, _ = run(short, says("facts", {"train_loss": 1.0, "num_examples": count}))
    assert list(done.record.quarantined) == [LIAR]
    assert "num_examples=" in done.record.quarantined[LIAR]


def test_a_bad_training_loss_is_dropped_alone(short: Config) -> None:
    done, _ = run(short, says("facts", {"train_loss": -1e300, "num_examples": 5, "z": 1.0}))
    assert done.record.quarantined == {}
    assert LIAR not in done.record.rounds[0]["train_loss"]
    assert done.record.clients[LIAR]["dropped"]["facts"].startswith("train_loss=-1e+300")


def test_a_replayed_update_is_quarantined(config: Config) -> None:
    kept: dict[str, Any] = {}

    def change(node: int, reply: Message) -> Message:
        if node == 103 and "update.arrays" in reply.content:
            for name in ("update.arrays", "update.scales"):
                reply.content[name] = kept.setdefault(name, reply.content[name])
        return reply

    done, _ = run({**config, "num_rounds": 3}, change)
    reasons = [entry["quarantined"].get(LIAR, "") for entry in done.record.rounds]
    assert reasons[0] == ""
    assert all("is the one of round 1 again, to the bit" in reason for reason in reasons[1:])


def test_who_learned_nothing_is_no_replay(config: Config) -> None:
    done, _ = run({**config, "learning_rate": 0.0, "local_steps": 1})
    assert done.round == 2
    assert done.record.quarantined == {}


@pytest.mark.parametrize("method", ["fedavg", "fedsa", "ffa"])
def test_damaged_replies_never_raise(short: Config, method: str, tmp_path: Path) -> None:
    saved: dict[int, RecordDict] = {}

    def keep(node: int, reply: Message) -> Message:
        if "update.arrays" in reply.content:
            saved.setdefault(node, reply.content)
        return reply

    run({**short, "aggregation": method}, keep)
    given = {**short, "aggregation": method, "output_dir": str(tmp_path / "second")}
    second = FlowerRun(LocalGrid(NODES, given), *read(given))
    loop = second.loop
    loop.begin(None)
    loop.transport.present(loop.run, 1)
    ask = Ask(1, loop.federation.stage(1), ["client-00"], loop.run)
    transport: Any = loop.transport
    assert transport._receive(ask, "client-00", Reply(100, copied(saved[100])))
    rng = random.Random(1)
    for _ in range(150):
        content = copied(saved[100])
        for _ in range(rng.randint(1, 2)):
            damage(content, rng)
        transport._receive(ask, "client-00", Reply(100, content))
    for facts in loop.run.record.clients.values():
        json.dumps(facts, allow_nan=False)


def copied(content: RecordDict) -> RecordDict:
    return RecordDict({name: type(record)(dict(record)) for name, record in content.items()})


def damage(content: RecordDict, rng: random.Random) -> None:
    """One random thing that a broken or a hostile client might send."""
    arrays, scales = content.get("update.arrays"), content.get("update.scales")
    if not arrays or not scales:
        return
    key = rng.choice(sorted(arrays))
    array = arrays[key]
    noise = bytes(rng.randrange(256) for _ in range(len(array.data)))
    changes: list[Any] = [
        lambda: arrays.update({key: Array(rng.choice(["int8", "", "x" * 99]), array.shape, array.stype, array.data)}),
        lambda: arrays.update({key: Array(array.dtype, rng.choice(SHAPES), array.stype, array.data)}),
        lambda: arrays.update({key: Array(array.dtype, array.shape, "numpy.ndarray", array.data)}),
        lambda: arrays.update({key: Array(array.dtype, array.shape, array.stype, array.data[:-1])}),
        lambda: arrays.update({key: Array(array.dtype, array.shape, array.stype, noise)}),
        lambda: scales.update({sorted(scales)[0]: rng.choice(SCALES)}),
        lambda: content.pop(rng.choice(sorted(content))),
        lambda: arrays.update({f"X:{rng.choice(NAMES)}": array}),
        lambda: content.update({"facts": rng.choice(FACTS)}),
        lambda: content.update({"config": rng.choice([MetricRecord({"a": 1}), ConfigRecord({"fresh": "\x1b[2J"})])}),
        lambda: content.update({"before": rng.choice(BEFORE)}),
        lambda: scales.update({"extra\n\x1b": 1.0}),
        lambda: arrays.update(of_rank(200, key, array)),
    ]
    rng.choice(changes)()


SHAPES: list[Any] = [(), (0,), (-1, 4), (2**40, 2**40), (1,) * 5, (10**9, 1)]
SCALES: list[Any] = [0, math.nan, math.inf, -1.0, 5e-324, 1e308, [1.0], 2**62]
NAMES = ["../../x", "\x1b[31m", "a" * 9999, "lm_head.weight", "", "\u202e"]
FACTS = [
    MetricRecord({"num_examples": [1, 2]}),
    MetricRecord({"a" * 9999: 1.0}),
    ConfigRecord({"num_examples": "x"}),
    ArrayRecord(),
]
BEFORE = [
    ConfigRecord({"loss": "low"}),
    MetricRecord({f"m{i}": 1.0 for i in range(500)}),
    MetricRecord({"loss": [1.0]}),
]


def of_rank(rank: int, key: str, array: Array) -> dict[str, Array]:
    """A factor of another rank, of zeros."""
    shape = (rank, array.shape[-1]) if key.startswith("A") else (array.shape[0], rank)
    return {key: Array("float32", shape, array.stype, torch.zeros(*shape).numpy().tobytes())}
