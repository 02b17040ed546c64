"""Where the clients' factors come from: what `estimator` reads, one module or several of one shape at a time."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from fedlora_hf.methods.clair import ClairOptions

Pair = tuple[Tensor, Tensor]
# A module, or several of one shape and rank that are worked on at once.
Key = str | tuple[str, ...]


class Source(Protocol):
    """Where the clients' factors come from, stacked: of a module B (K, out, r) and A (K, r, in), zero-padded to one
    rank, scale folded in; of several at once the same with a leading dimension. `change` is what clients learned this
    round, `whole` what they hold; `restarted` says that they are the same."""

    @property
    def modules(self) -> Sequence[str]: ...
    @property
    def keys(self) -> Sequence[Key]:
        """What is read at once: each module by itself, or all in groups."""
        ...

    @property
    def restarted(self) -> bool: ...
    def change(self, key: Key) -> Pair: ...
    def whole(self, key: Key) -> Pair: ...
    @property
    def large(self) -> bool:
        """Whether a module is worth a thread of its own."""
        ...

    def with_start(self, key: Key) -> Pair:
        """`whole` with one row more: what the clients started from, B (K + 1, out, r) and A (K + 1, r, in). Asked for
        only where not `restarted`."""
        ...


def names(key: Key) -> tuple[str, ...]:
    """The modules of a key."""
    return (key,) if isinstance(key, str) else key


def keys_of(source: Source, options: ClairOptions) -> Sequence[Key]:
    """What both readings go by: groups of modules, unless an option that few use is left to one module at a time."""
    plain = not options.center and not options.exact and options.refine != "soft"
    return source.keys if plain else source.modules


def turned(pair: Pair, side: str) -> Pair:
    """The pair of W, or of its transpose when the input side is looked at."""
    B, A = pair
    return pair if side == "output" else (A.mT.contiguous(), B.mT.contiguous())
