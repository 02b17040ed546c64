"""A second device without hardware: tensors that say they lie elsewhere, and are computed on the CPU.

As on CUDA, an operation on tensors of both places is refused unless it is a copy, a lone number or an index.
"""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

# Nothing else is ever there, and its name is one that every build of torch knows.
PLACE = torch.device("meta")
COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default}


class Elsewhere(Tensor):
    """A tensor of the other device; `held` is what it holds."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Elsewhere":
        more = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made: Elsewhere = Tensor._make_wrapper_subclass(cls, held.shape, device=PLACE, **more)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl


class OtherDevice(TorchDispatchMode):
    """Within it the other device exists: tensors are made there, moved there and back. `used`: operations run there."""

    def __init__(self) -> None:
        super().__init__()
        self.used: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = computed(func, args, kwargs or {})
        if any(isinstance(x, Elsewhere) for x in tree_flatten(args)[0]):
            self.used.add(func.overloadpacket.__name__)
        return found


def computed(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation on the CPU, its result where the device rules put it."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = any(isinstance(x, Elsewhere) for x in tensors)
    asked = kwargs.get("device")
    looked_at = tensors[:1] if func in INDEXED else tensors
    if there and func not in COPIES and not all(isinstance(x, Elsewhere) or x.ndim == 0 for x in looked_at):
        raise RuntimeError(f"{func}: expected all tensors on one device, found two")
    if asked is not None:
        there = torch.device(asked) == PLACE
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if func is torch.ops.aten.copy_.default:
        there = isinstance(args[0], Elsewhere)
    inner_args, inner = tree_map(_held, args), tree_map(_held, kwargs)
    found = func(*inner_args, **inner)
    if args and isinstance(args[0], Tensor) and func._schema.arguments[0].is_write:
        return args[0]
    return tree_map(lambda x: Elsewhere(x) if there and isinstance(x, Tensor) else x, found)


def _held(x: Any) -> Any:
    return x.held if isinstance(x, Elsewhere) else x
