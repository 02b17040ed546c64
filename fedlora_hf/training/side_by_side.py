"""Several adapters in the places of one: each row of a batch goes through the adapter whose row it is.

LoRA factors are stacked, (n, out, in), and applied by one batched product a layer. PEFT's own layers do the rest, so
quantised bases and direction/magnitude factors need nothing of their own. A module that is trained whole (a head) is
called for each adapter's rows in turn.
"""
# SPDX-License-Identifier: Apache-2.0

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedlora_hf.adapter.slot import AdapterSlot
from fedlora_hf.dirmag import DirMagLinear
from fedlora_hf.errors import ConfigError
from fedlora_hf.numerics.direction import fold


@dataclass
class Rows:
    """Whose rows the batch holds: those of `members` (places among the copies), one after the other, equally many."""

    members: Sequence[int] = field(default_factory=list)
    count: int = 0  # rows in all or, where a head is given answered positions alone, members

    def check(self, x: Tensor) -> None:
        """ConfigError for a module that sees something else than the batch's rows in their order."""
        if not self.count or x.shape[0] % self.count:
            raise ConfigError(
                f"clients_at_once: a layer with an adapter was given {x.shape[0]} rows of a batch of {self.count}, so "
                "it cannot tell whose they are; leave clients_at_once out"
            )


class _Grouped(nn.Module):
    """A linear map for each member: x (rows, ..., in) -> (rows, ..., out). `weight` tells the dtype, no more."""

    weight: Tensor

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows

    def weights(self) -> Tensor:
        """Those of the members whose rows come next, (members, out, in)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        self.rows.check(x)
        weights = self.weights()
        product = torch.bmm(x.reshape(len(weights), -1, x.shape[-1]), weights.transpose(1, 2))
        return product.reshape(*x.shape[:-1], weights.shape[1])


class FixedGroup(_Grouped):
    """Of weights that are not trained, (members, out, in)."""

    def __init__(self, weights: Tensor, rows: Rows) -> None:
        super().__init__(rows)
        self.weight = weights

    def weights(self) -> Tensor:
        return self.weight


class FactorGroup(_Grouped):
    """Of factors that are trained: each keeps parameters of its own, which get their own gradients."""

    def __init__(self, factors: Sequence[nn.Module], rows: Rows) -> None:
        super().__init__(rows)
        self.factors = tuple(factors)  # a tuple: they are no children, whose parameters a model would list

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return next(self.factors[0].parameters())

    def weights(self) -> Tensor:
        return stacked([self.factors[member] for member in self.rows.members])


def stacked(factors: Sequence[nn.Module]) -> Tensor:
    """The weights of plain or split factors of one shape, (n, out, in), differentiable in each one's parameters."""
    first = factors[0]
    if not isinstance(first, DirMagLinear):
        return torch.stack([factor.weight for factor in factors])  # type: ignore[misc]
    split = [factor for factor in factors if isinstance(factor, DirMagLinear)]
    if first.axis != "row":
        return torch.stack([factor.folded() for factor in split])
    # Rows are folded each by itself, so the rows of all members can be folded at once.
    magnitude, direction = (torch.cat([getattr(f, name) for f in split]) for name in ("magnitude", "direction"))
    return fold(magnitude, direction, "row").view(len(split), first.out_features, first.in_features)


class HeadGroup(nn.Module):
    """A whole module for each member, each called on its own rows."""

    def __init__(self, modules: Sequence[nn.Module], rows: Rows) -> None:
        super().__init__()
        self.copies, self.rows = tuple(modules), rows

    def forward(self, x: Tensor) -> Tensor:
        self.rows.check(x)
        parts = x.chunk(len(self.rows.members))
        return torch.cat([self.copies[m](part) for m, part in zip(self.rows.members, parts, strict=True)])


def copied(module: nn.Module) -> nn.Module:
    """A copy of a factor with parameters of its own, as deepcopy makes it, which takes ten times as long over it."""
    other = copy.copy(module)
    other._parameters = {
        name: None if own is None else nn.Parameter(own.detach().clone(), own.requires_grad)
        for name, own in module._parameters.items()
    }
    other._buffers = {name: None if own is None else own.clone() for name, own in module._buffers.items()}
    other._modules = {name: None if own is None else copied(own) for name, own in module._modules.items()}
    return other


class Seats:
    """Copies of all modules of an adapter slot, any one of which, or all together, can stand in the model.

    While one is in, the model is that member's own: it is read and written by the slot, and an optimizer made for the
    model is made for the member. `restored` puts the slot's own modules back at the end, untouched.
    """

    def __init__(self, slot: AdapterSlot, count: int) -> None:
        self.key, self.places, self.rows = slot.name, slot.places(), Rows()
        self.own = slot.modules()
        lora = 2 * len(slot.layers)
        self.copies = [
            [copied(module) if number < lora else copy.deepcopy(module) for number, module in enumerate(self.own)]
            for _ in range(count)
        ]
        groups: list[nn.Module] = []
        for number, modules in enumerate(zip(*self.copies, strict=True)):
            groups.append(FactorGroup(modules, self.rows) if number < lora else HeadGroup(modules, self.rows))
        self.groups = groups

    def take(self, member: int) -> None:
        """Put one member's modules in."""
        self._put(self.copies[member])

    def together(self, members: Sequence[int], count: int) -> None:
        """Have the model take batches of `count` rows, equally many of each of these members, in this order."""
        self.rows.members, self.rows.count = members, count
        self._put(self.groups)

    @contextmanager
    def restored(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._put(self.own)

    def _put(self, modules: Sequence[nn.Module]) -> None:
        # Past ModuleDict's own checks: this is done for every client at every step.
        for place, module in zip(self.places, modules, strict=True):
            place._modules[self.key] = module
