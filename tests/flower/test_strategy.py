"""Our methods as a Flower Strategy, over a ClientApp that imports nothing of ours."""
# SPDX-License-Identifier: Apache-2.0

import ast
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_app
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg, Result
from local_grid import LocalGrid
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from fedlora_hf.errors import ConfigError, UpdateError
from fedlora_hf.flower import ClairStrategy, MethodStrategy
from fedlora_hf.flower.peft_arrays import Scaling, read_arrays, write_arrays

pytestmark = pytest.mark.usefixtures("as_server")
NODES = {100 + place: {"partition-id": place} for place in range(6)}
ALL = {"min_train_nodes": 6, "min_available_nodes": 6, "min_evaluate_nodes": 6}
LORA = Scaling(foreign_app.ALPHA)


def initial() -> ArrayRecord:
    return ArrayRecord(get_peft_model_state_dict(foreign_app.build()))


def ran(
    strategy: FedAvg, how: Callable[[ArrayRecord], Any] | None = None, rounds: int = 2, nodes: Any = NODES
) -> Result:
    """A run of a strategy; `how`: what node 102 does to its adapter before it is sent, in place."""

    def change(node: int, reply: Message) -> Message:
        if how is not None and node == 102 and "arrays" in reply.content:
            how(reply.content["arrays"])
        return reply

    grid = LocalGrid(nodes, {}, change, foreign_app.app)
    return strategy.start(grid, initial(), rounds)


def scaled(factor: float) -> Callable[[ArrayRecord], None]:
    """Every B times a factor."""

    def change(arrays: ArrayRecord) -> None:
        for key in arrays:
            if "lora_B" in key:
                arrays[key] = Array(arrays[key].numpy() * np.float32(factor))

    return change


def test_the_clients_know_nothing_of_this_package() -> None:
    tree = ast.parse(Path(foreign_app.__file__).read_text(encoding="utf-8"))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} == {"torch", "flwr", "peft"}


def test_fedavg_of_ours_is_flowers() -> None:
    ours = ran(MethodStrategy("fedavg", lora_alpha=foreign_app.ALPHA, **ALL))
    theirs = ran(FedAvg(**ALL))
    assert list(ours.arrays) == list(theirs.arrays) == list(initial())
    for key, array in theirs.arrays.items():
        np.testing.assert_allclose(ours.arrays[key].numpy(), array.numpy(), atol=1e-6)
    for number, means in theirs.evaluate_metrics_clientapp.items():
        assert ours.evaluate_metrics_clientapp[number]["loss"] == pytest.approx(means["loss"], abs=1e-6)
        assert ours.train_metrics_clientapp[number]["loss"] == pytest.approx(
            theirs.train_metrics_clientapp[number]["loss"], abs=1e-6
        )


def test_clair_flags_a_node_and_leaves_it_out() -> None:
    strategy = ClairStrategy(lora_alpha=foreign_app.ALPHA, **ALL)
    done = ran(strategy, scaled(-30.0))
    assert [verdict.flagged for verdict in strategy.verdicts] == [(102,), (102,)]
    last = strategy.verdicts[-1]
    assert last.weights.get(102, 0.0) == 0.0
    assert sum(last.weights.values()) == pytest.approx(1.0)
    assert set(last.evidence) == set(NODES)
    assert any(item.score > item.threshold for item in last.evidence[102].values() if item.threshold)
    model = foreign_app.build()
    before = float(foreign_app.loss_of(model, 0).detach())
    set_peft_model_state_dict(model, done.arrays.to_torch_state_dict())
    assert float(foreign_app.loss_of(model, 0).detach()) < before
    assert strategy.personal(100) is not None
    assert strategy.personal(102) is None


def test_what_clair_makes_does_not_depend_on_the_order_of_replies() -> None:
    first = ran(ClairStrategy(lora_alpha=foreign_app.ALPHA, **ALL))
    turned = dict(reversed(list(NODES.items())))
    second = ran(ClairStrategy(lora_alpha=foreign_app.ALPHA, **ALL), nodes=turned)
    assert all(first.arrays[key].data == second.arrays[key].data for key in first.arrays)


def test_evidence_is_kept_over_rounds() -> None:
    """A node that was contaminated in round 1 stays flagged in round 2, where it behaves; a new start forgets it."""
    strategy = ClairStrategy(lora_alpha=foreign_app.ALPHA, **ALL)
    rounds = iter([scaled(-30.0), lambda arrays: None])
    ran(strategy, lambda arrays: next(rounds)(arrays))
    assert [verdict.flagged for verdict in strategy.verdicts] == [(102,), (102,)]
    ran(strategy, rounds=1)
    assert [verdict.flagged for verdict in strategy.verdicts] == [()]


def spoiled(key: str, array: Array | None) -> Callable[[ArrayRecord], None]:
    def change(arrays: ArrayRecord) -> None:
        name = next((name for name in arrays if name.endswith(key)), key)
        if array is None:
            del arrays[name]
        else:
            arrays[name] = array

    return change


def huge() -> Array:
    """A few bytes that claim 10^12 floats."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)})
    return Array("float32", (2, 8), "numpy.ndarray", file.getvalue() + bytes(64))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (scaled(float("nan")), "not finite"),
        (spoiled("first.lora_A.weight", None), "needs lora_A.weight and lora_B.weight"),
        (spoiled("first.lora_A.weight", Array(np.zeros((2, 5), np.float32))), "wrong shape"),
        (spoiled("first.lora_A.weight", Array(np.zeros((2, 8), np.int64))), "send floats"),
        (spoiled("first.lora_A.weight", Array(np.zeros((0, 8), np.float32))), "rank 0|needs|wrong|empty"),
        (spoiled("first.lora_A.weight", huge()), "send floats, whole"),
        (spoiled("first.lora_A.weight", Array("float32", (2, 8), "numpy.ndarray", b"none")), "is no NumPy array"),
        (spoiled("other.weight", Array(np.zeros(3, np.float32))), "too many"),
        (spoiled("first.lora_magnitude_vector", Array(np.zeros(3, np.float32))), "use plain LoRA"),
    ],
)
def test_an_update_that_cannot_be_used_is_quarantined_and_the_round_goes_on(how: Any, reason: str) -> None:
    strategy = ClairStrategy(lora_alpha=foreign_app.ALPHA, **ALL)
    done = ran(strategy, how, rounds=1)
    (verdict,) = strategy.verdicts
    assert list(verdict.quarantined) == [102]
    assert pytest.importorskip("re").search(reason, verdict.quarantined[102])
    assert all(np.isfinite(array.numpy()).all() for array in done.arrays.values())


@pytest.mark.parametrize("said", [float("nan"), -3, 2.5, [1], None, 2**60])
def test_a_number_of_examples_that_is_none_is_quarantined(said: Any) -> None:
    def change(node: int, reply: Message) -> Message:
        if node == 102 and "arrays" in reply.content:
            reply.content["metrics"] = MetricRecord({"loss": 1.0} | ({} if said is None else {"num-examples": said}))
        return reply

    strategy = MethodStrategy("fedavg", lora_alpha=foreign_app.ALPHA, **ALL)
    strategy.start(LocalGrid(NODES, {}, change, foreign_app.app), initial(), 1)
    assert "num_examples=" in strategy.verdicts[0].quarantined[102]


@pytest.mark.parametrize("said", [{"loss": -1e300, "num-examples": 5}, {"loss": float("nan"), "num-examples": 5}, {}])
def test_lies_about_metrics_enter_no_mean(said: dict[str, Any]) -> None:
    def change(node: int, reply: Message) -> Message:
        if node == 102 and "arrays" not in reply.content:
            reply.content["metrics"] = MetricRecord(said)
        return reply

    strategy = MethodStrategy("fedavg", lora_alpha=foreign_app.ALPHA, **ALL)
    done = strategy.start(LocalGrid(NODES, {}, change, foreign_app.app), initial(), 1)
    assert 0 < done.evaluate_metrics_clientapp[1]["loss"] < 100


def test_a_replayed_update_is_quarantined() -> None:
    kept: dict[str, Array] = {}

    def change(arrays: ArrayRecord) -> None:
        for key in arrays:
            arrays[key] = kept.setdefault(key, arrays[key])

    strategy = MethodStrategy("fedavg", lora_alpha=foreign_app.ALPHA, **ALL)
    ran(strategy, change)
    assert strategy.verdicts[0].quarantined == {}
    assert "earlier round again" in strategy.verdicts[1].quarantined[102]


def test_too_few_updates_change_nothing() -> None:
    strategy = ClairStrategy(lora_alpha=foreign_app.ALPHA, **ALL)
    grid = LocalGrid(NODES, {}, app=foreign_app.app)
    grid.gone = set(list(NODES)[2:])
    strategy.configure_train(1, initial(), ConfigRecord(), grid)
    replies = grid.send_and_receive(strategy.configure_train(1, initial(), ConfigRecord(), grid))
    assert strategy.aggregate_train(1, replies) == (None, None)
    assert strategy.verdicts[0].weights == {}


def test_other_ranks_are_written_in_the_rank_that_was_sent() -> None:
    """read and write are each other's inverse, whatever rank came; the scale is alpha / r of the adapter that came."""
    start = read_arrays(initial(), LORA)
    assert {factors.scale for factors in start.values()} == {foreign_app.ALPHA / foreign_app.RANK}
    again = write_arrays(start, initial(), start)
    assert all(again[key].data == array.data for key, array in initial().items())
    larger = foreign_app.build(4)
    torch.manual_seed(1)
    for name, tensor in larger.named_parameters():
        if "lora_B" in name:
            nn_like = torch.zeros_like(tensor)
            nn_like[:, 0] = torch.randn(len(tensor))
            tensor.data.copy_(nn_like)
    state = read_arrays(ArrayRecord(get_peft_model_state_dict(larger)), LORA)
    assert {factors.scale for factors in state.values()} == {1.0}
    back = read_arrays(write_arrays(state, initial(), start), LORA)
    for module, factors in state.items():
        torch.testing.assert_close(back[module].dense(), factors.dense(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"method": "fedsa"}, "its clients keep a factor for themselves"),
        ({"method": "stacking"}, "restart every round"),
        ({"method": "cliar"}, "did you mean 'clair'"),
        ({"lora_alpha": 0}, "lora_alpha=0: must be a number above 0"),
        ({"weight_by": "size"}, "weight_by='size'"),
        ({"method_options": {"rank_": 3}}, "option 'rank_'"),
    ],
)
def test_options_that_cannot_be_are_refused_at_once(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        MethodStrategy(**{"method": "clair", "lora_alpha": 4, **options})


def test_an_adapter_without_lora_is_refused_at_the_start() -> None:
    strategy = ClairStrategy(lora_alpha=4, **ALL)
    with pytest.raises(ConfigError, match="hold no lora_A"):
        strategy.configure_train(
            1, ArrayRecord([np.zeros(3)]), ConfigRecord(), LocalGrid(NODES, {}, app=foreign_app.app)
        )
    with pytest.raises(UpdateError, match=r"has rank 0|needs"):
        read_arrays(ArrayRecord({"m.lora_A.weight": Array(np.zeros((0, 3)))}), LORA)


def test_the_package_is_cheap_to_import() -> None:
    code = "import sys, fedlora_hf.flower; sys.exit(any(name in sys.modules for name in ('torch', 'flwr', 'peft')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
