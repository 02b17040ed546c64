"""A LoRA factor in two parts: a linear map whose weight is magnitude * direction / |direction|.

To everybody else it is an `nn.Linear` without bias: it has a `weight` to read and write, and its state dict has that
one key. Only `parameters()` shows the parts.
"""
# SPDX-License-Identifier: Apache-2.0

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora_hf.errors import AdapterError
from fedlora_hf.numerics.direction import Axis, fold, seeded_directions, split


class FoldedWeight(Tensor):
    """The folded weight as lent to others: reading gives a matrix, writing into it changes the parts.

    PEFT and its users write through `layer.weight.data` (add_weighted_adapter, hot-swapping, own code). The weight of
    a split factor is computed, so such a write would be lost without a word. Here each operation that changes the
    lent matrix, or a view of it, is followed by splitting it into its owner's parts again. Gradients flow as usual.
    """

    owner: "DirMagLinear"
    root: "FoldedWeight | None"
    no_swap: "weakref.ref[FoldedWeight]"

    @classmethod
    def lend(cls, matrix: Tensor, owner: "DirMagLinear", root: "FoldedWeight | None" = None) -> "FoldedWeight":
        """`matrix` as a lent weight of `owner`; `root` is the whole when this is a view of it."""
        lent = matrix.as_subclass(cls)
        lent.owner, lent.root = owner, root
        # torch.utils.swap_tensors trades the insides of two tensors, past every operation; it refuses a tensor with a
        # weak reference, and its one caller in PEFT then assigns `.data`, which is seen.
        lent.no_swap = weakref.ref(lent)
        return lent

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            lent = [value for value in _flat((*args, *kwargs.values())) if isinstance(value, FoldedWeight)]
            versions = [weight._version for weight in lent]
            result = func(*args, **kwargs)
            for weight, version in zip(lent, versions, strict=True):
                if weight._version != version or func == Tensor.data.__set__:  # type: ignore[attr-defined]
                    weight.owner.write(weight if weight.root is None else weight.root)
            return _lend_views(result, lent)


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def _lend_views(result: Any, lent: Iterable[FoldedWeight]) -> Any:
    """`result` with every tensor that shares memory with a lent weight made a lent weight too."""
    if type(result) in (list, tuple):
        return type(result)(_lend_views(value, lent) for value in result)
    if type(result) is Tensor:
        for weight in lent:
            if result.untyped_storage()._cdata == weight.untyped_storage()._cdata:
                return FoldedWeight.lend(result, weight.owner, weight if weight.root is None else weight.root)
    return result


class DirMagLinear(nn.Module):
    """y = x W^T with W = magnitude * direction / |direction|, W (out, in), no bias.

    magnitude: (out, 1) for axis "row", (1, in) for "column". direction: (out, in), of any length but 0. `trainable`
    holds the names of the parameters that train when the adapter does. `seed` gives the directions of vectors that
    are 0 in `weight`; they have magnitude 0, so the map is unchanged and yet every vector has a gradient.
    """

    dtype_wanted = False

    def __init__(self, weight: Tensor, axis: Axis, seed: int, trainable: Iterable[str]) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.axis, self.seed, self.bias = axis, seed, None
        self.trainable = frozenset(trainable)
        parts = split(weight, axis, seeded_directions(weight.shape, axis, seed))
        self.magnitude = nn.Parameter(parts.magnitude.to(weight.dtype))
        self.direction = nn.Parameter(parts.direction.to(weight.dtype))

    def folded(self) -> Tensor:
        """W, differentiable in both parts."""
        return fold(self.magnitude, self.direction, self.axis)

    @property
    def weight(self) -> Tensor:
        """W, differentiable in both parts; a write into it is split into the parts (`write`)."""
        if torch.compiler.is_compiling():  # a compiler traces reads only, and no subclass of Tensor
            return self.folded()
        if self.dtype_wanted:
            self.expect_dtype_read(False)
            return self.direction.new_empty(0)
        # Not an inference tensor even in inference mode: those do not count their versions, and a write would go by.
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return FoldedWeight.lend(self.folded(), self)
        return FoldedWeight.lend(self.folded(), self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":  # `factor.weight = nn.Parameter(...)`, as loaders of models do
            self.write(value)
        else:
            super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.folded())

    def expect_dtype_read(self, expected: bool) -> None:
        """Say that the next reading of `weight` is for its dtype alone, so that it is not folded for nothing."""
        # Past nn.Module's __setattr__, which costs more than this saves.
        object.__setattr__(self, "dtype_wanted", expected)

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Take `weight` (out, in) as the new W, in canonical parts; a vector of 0 gets its seeded direction.

        What is left depends on `weight` alone: a client that starts from B = 0 has nothing of whoever trained before
        it. In place, so optimizers keep hold of the parameters. AdapterError when the shape is another.
        """
        if weight.shape != self.direction.shape:
            raise AdapterError(
                f"weight {tuple(weight.shape)}: this direction/magnitude factor is {tuple(self.direction.shape)}; "
                "add an adapter of the other rank under a name of its own"
            )
        empty = not weight.any(dim=1 if self.axis == "row" else 0).all()
        fallback = seeded_directions(weight.shape, self.axis, self.seed) if empty else None
        for name, part in split(weight, self.axis, fallback)._asdict().items():
            parameter = getattr(self, name)
            if parameter.is_meta:
                setattr(self, name, nn.Parameter(part.to(weight.dtype), requires_grad=parameter.requires_grad))
            else:
                parameter.copy_(part)

    def freeze_rest(self) -> None:
        """Take the gradient from the parameters that are not in `trainable`; it never gives one."""
        for name, parameter in self.named_parameters():
            if name not in self.trainable:
                parameter.requires_grad_(False)
                # An optimizer steps on whatever gradient it finds, a stale one of the phase before too.
                parameter.grad = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        weight = self.folded()
        destination[prefix + "weight"] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is None:
            missing_keys.append(prefix + "weight")
            return
        try:
            self.write(weight)
        except AdapterError as error:
            error_msgs.append(f"{prefix}weight: {error}")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, magnitude per {self.axis}"
