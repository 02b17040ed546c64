"""Updates in fewer bits than float32: their change, rounded, with what earlier rounding lost.

A client sends Q(change + residual) and keeps residual = change + residual - Q(change + residual) on its node for the
next round: error feedback [Seide et al. 2014, "1-bit stochastic gradient descent"; Karimireddy et al. 2019, arXiv
1901.09847]. The server adds what came to what it sent. The change of a tensor that the server did not send in that
shape (another rank, a first head) is the whole tensor.

The residual is in the factors' coordinates, so it is carried over where these are the same in the next round: methods
that average factors, or train one of them. Where B A is averaged and factored anew every round, or rounds restart from
fresh factors, nothing is carried over.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Sequence

import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from torch import Tensor

from fedlora_hf.aggregation.soundness import unsound_state
from fedlora_hf.flower.int8 import to_int8
from fedlora_hf.flower.wire import (
    CHANGE,
    DTYPES,
    STYPE,
    put,
    put_tensors,
    sent_tensor,
    take_tensors,
    to_array,
    to_tensor,
)
from fedlora_hf.methods.method import Method
from fedlora_hf.update import AdapterState

RESIDUAL = "residual"
LOSSY = ("bfloat16", "float16", "int8")
WIRE_DTYPES = (*DTYPES, "int8")


def carries(method: Method) -> bool:
    """Whether what rounding lost in one round means the same in the next."""
    same_factors = method.averages == "factors" or method.trains != ("A", "B") or bool(method.turns)
    return same_factors and not method.restarts


def put_update(
    reply: RecordDict,
    update: AdapterState,
    sent: AdapterState,
    dtype: str,
    factors: Sequence[str],
    memory: RecordDict | None,
) -> None:
    """Add a client's update to its reply in the float, or int8, of the run.

    sent: what the server sent. memory: `Context.state`, where what rounding lost is kept; None: nothing is kept.
    """
    if dtype not in LOSSY:
        put(reply, "update", update, DTYPES[dtype], factors)
        return
    earlier = take_tensors(memory, RESIDUAL) if memory is not None else {}
    arrays, lost = ArrayRecord(), dict(earlier)
    for key, tensor in _tensors(update, factors).items():
        change, stype = _change(tensor, sent_tensor(sent, key))
        residual = earlier.get(key)
        if residual is not None and residual.shape == change.shape:
            change = change + residual
        arrays[key] = _rounded(change, key, dtype, stype)
        if memory is not None and change.isfinite().all():
            lost[key] = change - to_tensor(arrays[key], key, stype).float()
    if memory is not None and unsound_state(update) is None:
        put_tensors(memory, RESIDUAL, lost)
    reply["update.arrays"] = arrays
    reply["update.scales"] = MetricRecord({module: float(both.scale) for module, both in update.items()})


def _tensors(update: AdapterState, factors: Sequence[str]) -> dict[str, Tensor]:
    """{the key of its array: tensor} of all that is sent of an update."""
    found = {f"{factor}:{module}": getattr(both, factor) for module, both in update.items() for factor in factors}
    return found | {f"X:{name}": tensor for name, tensor in update.extras.items()}


def _change(tensor: Tensor, old: Tensor | None) -> tuple[Tensor, str]:
    """(what is to be sent of a tensor, in float32; how its receiver is to take it)."""
    tensor = tensor.detach().to("cpu", torch.float32)
    if old is None or old.shape != tensor.shape:
        return tensor, STYPE
    return tensor - old.float(), CHANGE


def _rounded(tensor: Tensor, key: str, dtype: str, stype: str) -> Array:
    if dtype == "int8":
        return to_int8(tensor, 1 if key.startswith("B:") else 0, stype)
    array = to_array(tensor, DTYPES[dtype])
    return Array(array.dtype, array.shape, stype, array.data)
