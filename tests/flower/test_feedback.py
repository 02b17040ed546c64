"""Updates in fewer bits: what int8 is, what rounding lost comes with the next update, and what is refused."""
# SPDX-License-Identifier: Apache-2.0

import struct

import numpy as np
import pytest
import torch
from flwr.app import Array, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from local_grid import NODES, Config, LocalGrid, run

from fedlora_hf.errors import UpdateError
from fedlora_hf.flower.federate import FlowerRun
from fedlora_hf.flower.feedback import RESIDUAL, carries, put_update
from fedlora_hf.flower.int8 import from_int8, to_int8
from fedlora_hf.flower.settings import read
from fedlora_hf.flower.wire import CHANGE, STYPE, take, take_tensors
from fedlora_hf.methods import METHODS, method_named
from fedlora_hf.update import AdapterState, LoraFactors

BOTH = ("A", "B")
floats = st.floats(-1e6, 1e6, width=32)


def state(seed: int, size: float = 1.0) -> AdapterState:
    rng = torch.Generator().manual_seed(seed)
    A, B = torch.randn(2, 12, generator=rng), torch.randn(10, 2, generator=rng)
    return AdapterState({"q": LoraFactors(size * A, size * B, 2.0)}, {"head": size * torch.randn(3, generator=rng)})


# ---- int8 ------------------------------------------------------------------------------------------------------------


@given(arrays.arrays(np.float32, arrays.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=floats))
def test_int8_is_within_half_a_step_of_its_row_or_column_and_the_same_every_time(found: np.ndarray) -> None:
    tensor = torch.from_numpy(found)
    for axis in (0, 1):
        array = to_int8(tensor, axis, STYPE)
        assert array == to_int8(tensor.clone(), axis, STYPE)
        assert len(array.data) == tensor.numel() + 4 * tensor.shape[axis]
        step = tensor.abs().amax(1 - axis, keepdim=True) / 127
        assert ((from_int8(array, "x") - tensor).abs() <= 0.5001 * step + 1e-37).all()


def test_halves_are_rounded_to_even_and_one_dimension_has_one_scale() -> None:
    array = to_int8(torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5]), 0, STYPE)
    assert array.data[:4] == struct.pack("<f", 1.0)
    assert np.frombuffer(array.data[4:], np.int8).tolist() == [127, 0, 2, 2, 0]


def scaled(scale: float, numbers: bytes = b"\x01\x02") -> Array:
    return Array("int8", (2,), STYPE, struct.pack("<f", scale) + numbers)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (scaled(float("nan")), "a scale is not finite"),
        (scaled(float("inf")), "a scale is not finite"),
        (scaled(-1.0), "a scale is not finite .* or below 0"),
        (scaled(1.0, b"\x80\x00"), "holds -128"),
        (scaled(1.0, b"\x01"), "they must fit"),
        (Array("int8 by columns", (2,), STYPE, bytes(6)), "they must fit"),
        (Array("int8 by rows", (2, 10**9), STYPE, bytes(20)), "they must fit"),
    ],
)
def test_hostile_scales_numbers_and_sizes_are_refused(array: Array, reason: str) -> None:
    with pytest.raises(UpdateError, match=reason) as refused:
        from_int8(array, "x")
    assert "\n" not in str(refused.value)


# ---- error feedback --------------------------------------------------------------------------------------------------


def sent(update: AdapterState, start: AdapterState, dtype: str, memory: RecordDict | None) -> AdapterState:
    """What the server reads of an update."""
    reply = RecordDict()
    put_update(reply, update, start, dtype, BOTH, memory)
    return take(reply, "update", BOTH, None, start)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_what_was_sent_and_what_is_kept_add_up_to_what_was_trained(dtype: str) -> None:
    """Over many rounds the server has received all that was learned but one round's rounding."""
    memory, start, learned, received = RecordDict(), state(0), torch.zeros(2, 12), torch.zeros(2, 12)
    for number in range(1, 20):
        change = state(number, 1e-3)["q"].A
        update = AdapterState(
            {"q": LoraFactors(start["q"].A + change, start["q"].B, 2.0)}, {"head": start.extras["head"]}
        )
        came = sent(update, start, dtype, memory)
        learned += update["q"].A - start["q"].A
        received += came["q"].A - start["q"].A
    kept = take_tensors(memory, RESIDUAL)["A:q"]
    assert torch.allclose(received + kept, learned, atol=1e-5)
    step = float(change.abs().max()) / (127 if dtype == "int8" else 200)
    assert float((received - learned).abs().max()) <= 2 * step


def test_a_number_too_small_for_int8_arrives_in_time_with_feedback_and_never_without() -> None:
    start = AdapterState({"q": LoraFactors(torch.zeros(1, 2), torch.zeros(1, 1), 1.0)}, {})
    update = AdapterState({"q": LoraFactors(torch.tensor([[1.0, 0.003]]), torch.zeros(1, 1), 1.0)}, {})
    memory = RecordDict()
    with_memory = sum(float(sent(update, start, "int8", memory)["q"].A[0, 1]) for _ in range(100))
    without = sum(float(sent(update, start, "int8", None)["q"].A[0, 1]) for _ in range(100))
    assert without == 0
    assert with_memory == pytest.approx(0.3, abs=0.01)


def test_full_floats_are_sent_as_they_always_were_and_keep_nothing() -> None:
    memory, update = RecordDict(), state(1)
    reply = RecordDict()
    put_update(reply, update, state(0), "float32", BOTH, memory)
    assert {array.stype for array in reply["update.arrays"].values()} == {STYPE}
    assert take(reply, "update")["q"].A.equal(update["q"].A)
    assert not memory


def test_another_rank_travels_whole_and_nan_is_seen_and_not_kept() -> None:
    start = state(0)
    other = AdapterState({"q": LoraFactors(torch.ones(1, 12), torch.ones(10, 1), 4.0)}, dict(start.extras))
    assert sent(other, start, "int8", None)["q"].A.equal(torch.ones(1, 12))
    memory = RecordDict()
    broken = AdapterState({"q": LoraFactors(start["q"].A * torch.nan, start["q"].B, 2.0)}, dict(start.extras))
    with pytest.raises(UpdateError, match=r"'A:q': a scale is not finite \(NaN or Inf\)"):
        sent(broken, start, "int8", memory)
    assert not memory


def test_a_change_of_what_was_never_sent_is_refused() -> None:
    reply = RecordDict()
    put_update(reply, state(1), state(0), "int8", BOTH, None)
    assert {array.stype for array in reply["update.arrays"].values()} == {CHANGE}
    with pytest.raises(UpdateError, match=r"a change of .*, sent was nothing; send it whole"):
        take(reply, "update")


def test_residuals_are_carried_where_factors_mean_the_same_from_round_to_round() -> None:
    assert {name for name in METHODS if carries(method_named(name))} >= {
        "fedavg",
        "dirmag_mean",
        "ffa",
        "rolora",
        "fedsa",
    }
    assert not any(carries(method_named(name)) for name in ("clair", "median", "product_mean", "stacking"))


# ---- in a run --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_server", "bare_output")
def test_int8_takes_a_quarter_of_the_bytes_and_lands_near(config: Config) -> None:
    exact, _ = run(config)
    rounded, grid = run({**config, "wire_dtype": "int8", "output_dir": f"{config['output_dir']}-8"})
    for entry, whole in zip(rounded.record.rounds, exact.record.rounds, strict=True):
        for client, count in entry["bytes_up"].items():
            assert 0.25 * whole["bytes_up"][client] < count < 0.33 * whole["bytes_up"][client]
    for module, factors in exact.state.items():
        assert (rounded.state[module] - factors).norm() < 0.02 * factors.norm()
    assert all(f"{RESIDUAL}.arrays" in memory for memory in grid.memory.values())
    assert "forgot_residual" not in exact.record.rounds[1]
    assert rounded.record.rounds[1]["forgot_residual"] == []


@pytest.mark.usefixtures("as_server", "bare_output")
def test_a_node_that_was_started_again_has_lost_its_residual_and_the_record_says_so(config: Config) -> None:
    grid: LocalGrid

    def forget(node: int, reply: Message) -> Message:
        if "update.arrays" in reply.content and node == 101:
            grid.memory[101] = RecordDict()
        return reply

    config["wire_dtype"] = "int8"
    grid = LocalGrid(NODES, config, forget)
    done = FlowerRun(grid, *read(config)).train()
    assert [entry["forgot_residual"] for entry in done.record.rounds] == [[], ["client-01"]]


@pytest.mark.usefixtures("as_server", "bare_output")
def test_a_change_that_is_sent_again_is_found_whatever_it_is_added_to(config: Config) -> None:
    first: dict[str, object] = {}

    def replay(node: int, reply: Message) -> Message:
        if "update.arrays" in reply.content and node == 103:
            reply.content["update.arrays"] = first.setdefault("sent", reply.content["update.arrays"])
        return reply

    done, _ = run({**config, "wire_dtype": "int8"}, replay)
    assert "the update is the one of round 1 again" in done.record.quarantined["client-03"]
