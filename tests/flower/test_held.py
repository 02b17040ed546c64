"""Adapters go down as changes where that is smaller: the same bytes arrive, and who holds nothing gets the whole."""
# SPDX-License-Identifier: Apache-2.0

import zlib
from pathlib import Path

import models
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from local_grid import NODES, Config, LocalGrid, run

from fedlora_hf.errors import UpdateError
from fedlora_hf.flower.federate import FlowerRun
from fedlora_hf.flower.held import XOR, Downlink, Parcel, difference, fingerprint_of, holdings, rebuilt, restored, size
from fedlora_hf.flower.settings import read
from fedlora_hf.flower.wire import take
from fedlora_hf.update import AdapterState, LoraFactors


def state(seed: int, rank: int = 3, extras: int = 0) -> AdapterState:
    rng = torch.Generator().manual_seed(seed)
    factors = {
        name: LoraFactors(torch.randn(rank, 40, generator=rng), torch.randn(30, rank, generator=rng), 2.0)
        for name in ("q", "v")
    }
    return AdapterState(factors, {f"head{n}": torch.randn(2, 30, generator=rng) for n in range(extras)})


def moved(before: AdapterState, by: float) -> AdapterState:
    """B moves a little, A not at all."""
    return AdapterState({m: LoraFactors(f.A, f.B * (1 + by), f.scale) for m, f in before.items()}, before.extras)


@given(st.integers(0, 9), st.sampled_from([0.0, 1e-7, 1e-3, 1.0]), st.integers(1, 4), st.integers(0, 1))
def test_a_change_rebuilds_the_same_bytes_and_is_never_larger(seed: int, by: float, rank: int, extras: int) -> None:
    old = Parcel.of(state(seed, rank))
    new = Parcel.of(moved(state(seed, rank, extras), by))
    change = difference(new.arrays, old.arrays)
    assert change is not None
    assert size(change) <= size(new.arrays)
    again = rebuilt(change, old.arrays)
    assert fingerprint_of(again) == new.fingerprint
    assert {key: array.data for key, array in again.items()} == {key: array.data for key, array in new.arrays.items()}


def test_what_is_the_same_is_not_sent_and_what_moved_a_little_is_sent_in_fewer_bytes() -> None:
    old = Parcel.of(state(1))
    change = difference(Parcel.of(moved(state(1), 1e-4)).arrays, old.arrays)
    assert change is not None
    assert {key.partition(":")[0] for key in change} == {"B"}
    assert {array.stype for array in change.values()} == {XOR}
    assert size(change) < 0.9 * sum(len(array.data) for key, array in old.arrays.items() if key[0] == "B")


def test_other_shapes_and_dtypes_travel_whole_and_arrays_that_are_gone_need_a_whole_state() -> None:
    old, new = Parcel.of(state(1, rank=2)), Parcel.of(state(1, rank=3))
    change = difference(new.arrays, old.arrays)
    assert change is not None
    assert dict(change) == dict(new.arrays)
    assert difference(Parcel.of(state(1)).arrays, Parcel.of(state(1, extras=1)).arrays) is None


def test_a_node_that_holds_the_base_restores_it_and_one_that_does_not_says_so() -> None:
    downlink, memory = Downlink(), RecordDict()
    first, second = Parcel.of(state(1)), Parcel.of(moved(state(1), 1e-4))
    content = RecordDict()
    assert downlink.put(content, "start", first, "ada") == size(first.arrays)
    assert restored(content, memory)
    downlink.heard("ada", {"holds": holdings(memory)})
    content = RecordDict()
    assert downlink.put(content, "start", second, "ada") < size(second.arrays)
    assert not restored(RecordDict(dict(content)), RecordDict())
    assert restored(content, memory)
    assert take(content, "start")["q"].B.equal(moved(state(1), 1e-4)["q"].B)
    assert holdings(memory) == [second.fingerprint]
    # The same adapter again, under its other name, is no bytes at all; bob has said nothing and gets it whole.
    downlink.heard("ada", {"holds": holdings(memory)})
    assert downlink.put(RecordDict(), "global", second, "ada") == 0
    assert downlink.put(RecordDict(), "global", second, "bob") == size(second.arrays)


def test_an_adapter_too_large_to_be_kept_is_sent_whole_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    downlink, memory, parcel = Downlink(), RecordDict(), Parcel.of(state(1))
    monkeypatch.setattr("fedlora_hf.flower.held.LARGEST_HELD", size(parcel.arrays) - 1)
    for _ in range(2):
        content = RecordDict()
        assert downlink.put(content, "start", parcel, "ada") == size(parcel.arrays)
        assert restored(content, memory)
        downlink.heard("ada", {"holds": holdings(memory)})
    assert not memory


@pytest.mark.parametrize("said", [{}, {"holds": "x"}, {"holds": [1, None]}, {"holds": ["0" * 32] * 1000}])
def test_what_a_node_says_it_holds_is_no_more_than_a_hint(said: dict[str, object]) -> None:
    downlink, parcel = Downlink(), Parcel.of(state(1))
    downlink.heard("ada", said)
    assert downlink.put(RecordDict(), "start", parcel, "ada") == size(parcel.arrays)


@pytest.mark.parametrize("bits", [b"", b"nonsense", zlib.compress(bytes(10**6))])
def test_bits_that_do_not_fit_are_refused_and_never_unfolded_beyond_their_size(bits: bytes) -> None:
    old = Parcel.of(state(1)).arrays
    key = next(iter(old))
    with pytest.raises(UpdateError, match="its change does not fit"):
        rebuilt(ArrayRecord({key: Array("float32", old[key].shape, XOR, bits)}), old)
    with pytest.raises(UpdateError, match="its change does not fit"):
        rebuilt(ArrayRecord({"A:other": Array("float32", (1, 2), XOR, bits)}), old)


# ---- in a run --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_server", "bare_output")
@pytest.mark.parametrize("method", ["ffa", "stacking"])
def test_later_rounds_send_less_down(config: Config, method: str) -> None:
    """ffa never changes A; stacking starts every round from the same fresh factors, on a frozen sum that grows. That
    the adapters are those of `fedlora train` all the same is test_flower_run's to show."""
    done, _ = run({**config, "aggregation": method, "num_rounds": 3})
    down = [entry["bytes_down"]["client-00"] for entry in done.record.rounds]
    if method == "ffa":
        assert down[0] == sum(4 * (f.A.numel() + f.B.numel()) for f in done.state.values())
        assert down[1] < 0.7 * down[0]
    else:  # the four clients' adapters one below the other, and not the start
        assert down[1] == 4 * down[0]


@pytest.mark.usefixtures("as_server", "bare_output")
def test_a_node_that_was_started_again_is_sent_the_whole_and_the_result_is_the_same(config: Config) -> None:
    config["aggregation"] = "ffa"
    expected = models.weight_files(_output(run(config)[1]))
    grid: LocalGrid

    def forget(node: int, reply: Message) -> Message:
        if "update.arrays" in reply.content and node == 102:
            grid.memory[102] = RecordDict()
        return reply

    grid = LocalGrid(NODES, config, forget)
    grid.config["output_dir"] = config["output_dir"] = f"{config['output_dir']}-again"
    done = FlowerRun(grid, *read(config)).train()
    assert models.weight_files(_output(grid)) == expected
    down = done.record.rounds[1]["bytes_down"]
    assert down["client-02"] == down["client-00"] + done.record.rounds[0]["bytes_down"]["client-00"]
    assert done.record.quarantined == {}


def _output(grid: LocalGrid) -> Path:
    return Path(grid.config["output_dir"])
