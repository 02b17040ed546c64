"""Adapters in Flower's records: tensors travel as their own bits, whatever float they are, and scales beside them.

A state named "start" is two records: `start.arrays` with "A:<module>", "B:<module>" and "X:<whole tensor>", and
`start.scales` {module: scale}; a factor that need not travel is left out. An array's dtype is torch's name of it, so
bfloat16, which numpy lacks, travels too.
"""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Mapping, Sequence

import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from torch import Tensor

from fedlora_hf.errors import UpdateError
from fedlora_hf.flower import int8
from fedlora_hf.training.stages import FACTORS
from fedlora_hf.update import AdapterState, LoraFactors

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
STYPE = "fedlora.bits"
# Of an array that is to be added to what its receiver sent.
CHANGE = "fedlora.change"
MAX_DIMENSIONS = 4
# Under this name control variates travel, and lie in a node's state.
SCAFFOLD = "scaffold"


def put(
    content: RecordDict,
    name: str,
    state: AdapterState,
    dtype: torch.dtype | None = None,
    factors: Sequence[str] = FACTORS,
) -> int:
    """Add a state to a message under `name`, its tensors in `dtype` (None: their own); the bytes of its tensors.

    factors: those that are put in; whole tensors always are.
    """
    arrays = ArrayRecord()
    for module, both in state.items():
        for factor in factors:
            arrays[f"{factor}:{module}"] = to_array(getattr(both, factor), dtype)
    for extra, tensor in state.extras.items():
        arrays[f"X:{extra}"] = to_array(tensor, dtype)
    content[f"{name}.arrays"] = arrays
    content[f"{name}.scales"] = MetricRecord({module: float(both.scale) for module, both in state.items()})
    return tensor_bytes(content, name)


def tensor_bytes(content: RecordDict, name: str) -> int:
    """Bytes of the tensors of that name in a message; 0 where there are none."""
    arrays = content.get(f"{name}.arrays")
    return sum(len(array.data) for array in arrays.values()) if isinstance(arrays, ArrayRecord) else 0


def holds(content: RecordDict, name: str) -> bool:
    """Whether a message has a state of that name."""
    return f"{name}.arrays" in content


def take(
    content: RecordDict,
    name: str,
    factors: Sequence[str] = FACTORS,
    rest: AdapterState | None = None,
    since: AdapterState | None = None,
) -> AdapterState:
    """The state of that name in a message; UpdateError, one line, for anything that is not one.

    factors: those that it must have, and no other; the others are `rest`'s, in the rank and scale of what came.
    since: what changes are to be added to; None where none may come.
    """
    arrays, scales = content.get(f"{name}.arrays"), content.get(f"{name}.scales")
    if not isinstance(arrays, ArrayRecord) or not isinstance(scales, MetricRecord):
        raise UpdateError(f"message without {name!r}: needs {name}.arrays and {name}.scales; use this package's client")
    tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in (*factors, "X")}
    for key, array in arrays.items():
        kind, _, module = key.partition(":")
        if kind not in tensors or not module:
            kinds = ", ".join(f"{kind}:" for kind in tensors)
            raise UpdateError(f"array {key[:80]!r}: must be one of {kinds} and a name; use this package's client")
        tensors[kind][module] = _added(array, key, since) if array.stype == CHANGE else to_tensor(array, key)
    modules = set(scales) if rest is None else set(rest)
    needed: list[set[str]] = [set(scales), *(set(tensors[factor]) for factor in factors)]
    if odd := [module for found in needed for module in sorted(modules ^ found)]:
        parts = ", ".join([*factors, "a scale"])
        raise UpdateError(f"module {odd[0][:80]!r}: needs {parts} and nothing else; use this package's client")
    state = {}
    for module in sorted(modules):
        came = {factor: tensors[factor][module] for factor in factors}
        state[module] = _factors(module, came, _scale(scales, module), None if rest is None else rest[module])
    return AdapterState(state, tensors["X"])


def put_tensors(content: RecordDict, name: str, tensors: Mapping[str, Tensor]) -> int:
    """Add named tensors to a message, or to a node's own state; their bytes."""
    content[f"{name}.arrays"] = ArrayRecord({key: to_array(tensor) for key, tensor in tensors.items()})
    return tensor_bytes(content, name)


def take_tensors(content: RecordDict, name: str) -> dict[str, Tensor]:
    """The named tensors of that name; {} where there are none, UpdateError for anything else."""
    arrays = content.get(f"{name}.arrays")
    if arrays is None:
        return {}
    if not isinstance(arrays, ArrayRecord):
        raise UpdateError(f"{name}.arrays is no record of arrays; use this package's client")
    return {key: to_tensor(array, key) for key, array in arrays.items()}


def in_rank(factors: LoraFactors, rank: int, scale: float) -> LoraFactors:
    """The same update written with another rank and scale: truncated when its rank is higher, padded when lower.

    Where B is 0 in the columns that are too many, as in a fresh adapter, A keeps its first rows as they are: the best
    approximation of 0 is A = 0 too, from where nothing is ever learned.
    """
    if factors.rank > rank:
        spare = not factors.B[:, rank:].any()
        first = LoraFactors(factors.A[:rank], factors.B[:, :rank], factors.scale)
        factors = first if spare else factors.truncated(rank, factors.scale)[0]
    return factors.rescaled(scale).padded(rank)


def _factors(module: str, came: dict[str, Tensor], scale: float, rest: LoraFactors | None) -> LoraFactors:
    """One module's factors: what came and, of `rest`, what did not."""
    if rest is None:
        return LoraFactors(came["A"], came["B"], scale)
    rank = rest.rank
    for factor, tensor in came.items():
        like, place = getattr(rest, factor), "AB".index(factor)  # the rank is A's rows and B's columns
        fits = tensor.ndim == 2 and tensor.shape[1 - place] == like.shape[1 - place]
        if not fits or tensor.shape[place] > sum(rest.shape):
            shapes = f"{tuple(tensor.shape)}, must be like {tuple(like.shape)}"
            raise UpdateError(f"wrong shape: {factor} of {module[:80]} is {shapes}; load the right model")
        rank = tensor.shape[place]
    if not scale:
        raise UpdateError(f"scale of {module[:80]!r}: is 0; use this package's client")
    rest = in_rank(rest, rank, scale)
    return LoraFactors(came.get("A", rest.A), came.get("B", rest.B), scale)


def to_array(tensor: Tensor, dtype: torch.dtype | None = None) -> Array:
    """A tensor as bits, dtype and shape."""
    tensor = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
    bits = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return Array(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), STYPE, bits)


def to_tensor(array: Array, name: str, stype: str = STYPE) -> Tensor:
    """The tensor again (of int8: in float32); UpdateError when dtype, shape and number of bytes do not go together."""
    dtype, shape = DTYPES.get(array.dtype), tuple(array.shape)
    if (dtype is None and array.dtype not in int8.DTYPES) or array.stype != stype:
        raise UpdateError(
            f"array {name[:80]!r}: is {array.dtype[:20]!r} as {array.stype[:20]!r}; must be one of {', '.join(DTYPES)} "
            f"as {stype!r}; use this package's client"
        )
    sound = 0 < len(shape) <= MAX_DIMENSIONS and all(type(size) is int and size > 0 for size in shape)
    if sound and dtype is None:
        return int8.from_int8(array, name)
    if not sound or dtype is None or math.prod(shape) * dtype.itemsize != len(array.data):
        raise UpdateError(
            f"array {name[:80]!r}: shape {str(shape)[:60]} of {array.dtype} with {len(array.data)} bytes; they must fit"
        )
    return torch.frombuffer(bytearray(array.data), dtype=dtype).reshape(shape)


def sent_tensor(state: AdapterState | None, key: str) -> Tensor | None:
    """What a state has under an array's key ("A:<module>", "X:<name>"); None where it has nothing."""
    kind, _, name = key.partition(":")
    if state is None:
        return None
    if kind == "X":
        return state.extras.get(name)
    return getattr(state[name], kind) if name in state else None


def _added(array: Array, key: str, since: AdapterState | None) -> Tensor:
    """What a change makes of what its receiver sent; UpdateError where that was nothing of the kind."""
    change, old = to_tensor(array, key, CHANGE), sent_tensor(since, key)
    if old is None or old.shape != change.shape:
        was = "nothing" if old is None else tuple(old.shape)
        raise UpdateError(f"array {key[:80]!r}: a change of {tuple(change.shape)}, sent was {was}; send it whole")
    return old.float() + change.float()


def _scale(scales: MetricRecord, module: str) -> float:
    value = scales[module]
    if isinstance(value, list):
        raise UpdateError(f"scale of {module[:80]!r}: is a list; must be a number; use this package's client")
    return float(value)
