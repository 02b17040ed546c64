"""The wire: every float to the bit, mixed ranks and shapes, and one line for whatever is not an adapter."""
# SPDX-License-Identifier: Apache-2.0

import pytest
import sample_updates
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

from fedlora_hf.errors import UpdateError
from fedlora_hf.flower.wire import DTYPES, holds, put, take, to_array, to_tensor
from fedlora_hf.update import AdapterState, LoraFactors

AWKWARD = (0.0, -0.0, 1.0, -1 / 3, 6e-8, 1e-30, 65504.0, float("inf"), float("nan"))


def state() -> AdapterState:
    """Modules of other shapes, ranks and scales, and a whole tensor."""
    generator = torch.Generator().manual_seed(0)
    factors = {
        f"model.layers.{number}.q": LoraFactors(
            torch.randn(rank, 6 + number, generator=generator), torch.randn(5, rank, generator=generator), 1 / rank
        )
        for number, rank in enumerate((1, 3, 4))
    }
    return AdapterState(factors, {"score.weight": torch.randn(3, 2, 2, generator=generator)})


def sent(content: RecordDict) -> RecordDict:
    """A message's content as it arrives: through Flower's own bytes."""
    from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

    return recorddict_from_proto(recorddict_to_proto(content))


@pytest.mark.parametrize("name", DTYPES)
def test_every_float_travels_to_the_bit(name: str) -> None:
    tensor = torch.tensor(AWKWARD, dtype=torch.float64).to(DTYPES[name]).reshape(3, 3)
    again = to_tensor(to_array(tensor), "x")
    assert again.dtype == tensor.dtype
    assert torch.equal(again.view(torch.uint8), tensor.view(torch.uint8))


def test_a_state_of_mixed_ranks_travels_to_the_bit() -> None:
    content = RecordDict()
    size = put(content, "update", state())
    assert size == state().nbytes()
    arrived = sent(content)
    assert holds(arrived, "update")
    assert not holds(arrived, "start")
    assert sample_updates.same_bits(take(arrived, "update"), state())
    assert {module: factors.scale for module, factors in take(arrived, "update").items()} == {
        module: factors.scale for module, factors in state().items()
    }


def test_bfloat16_halves_the_message_and_rounds_once() -> None:
    content = RecordDict()
    assert put(content, "update", state(), torch.bfloat16) == state().nbytes() // 2
    for module, factors in take(sent(content), "update").items():
        assert factors.A.dtype == torch.bfloat16
        assert torch.equal(factors.A, state()[module].A.bfloat16())


def test_a_view_of_a_larger_tensor_travels_alone() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    assert torch.equal(to_tensor(to_array(whole.T), "x"), whole.T)


GOOD = to_array(torch.ones(2, 3))
BROKEN = {
    "no scale": ({"A:m": GOOD, "B:m": GOOD}, {}, "module 'm': needs A, B, a scale and nothing else"),
    "no B": ({"A:m": GOOD}, {"m": 1.0}, "module 'm': needs A, B, a scale and nothing else"),
    "odd key": ({"model.q.weight": GOOD}, {}, "must be one of A:, B:, X: and a name"),
    "odd ranks": ({"A:m": GOOD, "B:m": GOOD}, {"m": 1.0}, "A must be"),
    "integers": ({"A:m": Array("int64", (2, 3), GOOD.stype, bytes(48))}, {"m": 1.0}, "must be one of float32"),
    "pickled": ({"A:m": Array("float32", (2, 3), "pickle", bytes(24))}, {"m": 1.0}, "as 'pickle'"),
    "too few bytes": ({"A:m": Array("float32", (2, 3), GOOD.stype, bytes(20))}, {"m": 1.0}, "with 20 bytes"),
    "a huge shape": ({"A:m": Array("float32", (2**40, 2**40), GOOD.stype, b"")}, {"m": 1.0}, "with 0 bytes"),
    "a shape below zero": ({"A:m": Array("float32", (-2, -3), GOOD.stype, bytes(24))}, {"m": 1.0}, "they must fit"),
    "a list for a scale": ({"A:m": GOOD, "B:m": to_array(torch.ones(4, 2))}, {"m": [1.0, 2.0]}, "must be a number"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_adapter_is_refused_in_one_line(name: str) -> None:
    arrays, scales, reason = BROKEN[name]
    content = RecordDict({"update.arrays": ArrayRecord(arrays), "update.scales": MetricRecord(scales)})
    with pytest.raises(UpdateError, match=reason) as refused:
        take(content, "update")
    assert "\n" not in str(refused.value)


def test_a_message_without_a_state_is_refused() -> None:
    with pytest.raises(UpdateError, match=r"needs update\.arrays and update\.scales"):
        take(RecordDict({"update.arrays": MetricRecord({"a": 1.0})}), "update")
