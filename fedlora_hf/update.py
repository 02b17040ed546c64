"""The one noun that travels between clients and server: low-rank updates, with their algebra.

A LoRA adapter changes a weight matrix by `W = scale * B @ A`, with A (r, in) and B (out, r). Everything here is
frozen; an operation gives a new value. Sums are exact (ranks add up); only `truncated` loses anything, and says how
much. Ranks and scales may differ from client to client.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedlora_hf.errors import UpdateError
from fedlora_hf.numerics import lowrank
from fedlora_hf.numerics.evidence import Evidence


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """One module's update `W = scale * B @ A`.

    A: (r, in). B: (out, r). scale: alpha / r, or alpha / sqrt(r) for rslora; it travels with the factors, because
    the same A and B mean another update under another scale. Both are detached: an update carries no graph.

    ```python
    import torch

    from fedlora_hf.update import LoraFactors

    factors = LoraFactors(A=torch.ones(2, 6), B=torch.ones(4, 2), scale=0.5)
    assert factors.shape == (4, 6) and factors.rank == 2
    assert torch.equal(factors.dense(), torch.ones(4, 6))
    ```
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name, factor in (("A", self.A), ("B", self.B)):
            if not isinstance(factor, Tensor):
                raise UpdateError(f"{name} is {type(factor).__name__}: must be a torch tensor; convert it")
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise UpdateError(
                f"A {tuple(self.A.shape)} and B {tuple(self.B.shape)}: A must be (r, in) and B (out, r) with one r; "
                "pass the weights of lora_A and lora_B as PEFT stores them"
            )
        object.__setattr__(self, "A", self.A.detach())
        object.__setattr__(self, "B", self.B.detach())

    @property
    def rank(self) -> int:
        """r, the number of rows of A (not the numerical rank of the product)."""
        return int(self.A.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight matrix that is changed."""
        return int(self.B.shape[0]), int(self.A.shape[1])

    def pair(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """(B, A) in `dtype` with the scale folded into B, so that `W = B @ A`: the form `numerics` works on."""
        return self.B.to(dtype) * self.scale, self.A.to(dtype)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W itself, (out, in). For tests and small matrices."""
        B, A = self.pair(dtype)
        return B @ A

    def __add__(self, other: "LoraFactors") -> "LoraFactors":
        """The exact sum, of rank r + r'; its scale is 1."""
        if self.shape != other.shape:
            raise UpdateError(
                f"updates of shapes {self.shape} and {other.shape}: only updates of one module can be added"
            )
        # Never below float32: a sum in bfloat16 would not be the sum.
        dtype = torch.promote_types(torch.promote_types(self.B.dtype, other.B.dtype), torch.float32)
        (B, A), (other_B, other_A) = self.pair(dtype), other.pair(dtype)
        return LoraFactors(torch.cat([A, other_A]), torch.cat([B, other_B], dim=1))

    def __mul__(self, factor: float) -> "LoraFactors":
        return LoraFactors(self.A, self.B, self.scale * float(factor))

    __rmul__ = __mul__

    def __neg__(self) -> "LoraFactors":
        return self * -1.0

    def __sub__(self, other: "LoraFactors") -> "LoraFactors":
        return self + -other

    def norm(self) -> float:
        """Frobenius norm of W, from the factors."""
        B, A = self.pair(torch.float64)
        return float(lowrank.inner(B, A, B, A).clamp_min(0).sqrt())

    def rescaled(self, scale: float) -> "LoraFactors":
        """The same update written with another scale (B takes up the difference)."""
        if scale == self.scale:
            return self
        return LoraFactors(self.A, self.B * (self.scale / scale), scale)

    def padded(self, rank: int) -> "LoraFactors":
        """The same update with zero rows and columns up to `rank`."""
        if rank < self.rank:
            raise UpdateError(f"rank {rank}: below the factors' own {self.rank}; use truncated(rank) to lose rank")
        missing = rank - self.rank
        if not missing:
            return self
        A = torch.cat([self.A, self.A.new_zeros(missing, self.A.shape[1])])
        return LoraFactors(A, torch.cat([self.B, self.B.new_zeros(self.B.shape[0], missing)], dim=1), self.scale)

    def truncated(self, rank: int, scale: float = 1.0) -> tuple["LoraFactors", float]:
        """(best update of at most `rank`, relative squared Frobenius norm that was discarded).

        Exact in factor space (QR of both factors and a small SVD, in float64). Singular values are shared evenly
        between A and B. Always `rank` rows, zero-padded if W has less.
        """
        low = lowrank.truncate(*self.pair(torch.float64), rank)
        return LoraFactors.from_low_rank(low, rank, scale), low.discarded

    @classmethod
    def from_low_rank(cls, low: lowrank.LowRank, rank: int, scale: float = 1.0) -> "LoraFactors":
        """float32 factors of a truncated matrix, written with `scale` and zero-padded to `rank` rows.

        The scale is shared evenly between the factors, as the singular values are; B takes its sign.
        """
        split = abs(scale) ** -0.5
        B = low.B * (split if scale > 0 else -split)
        return cls((low.A * split).float(), B.float(), scale).padded(rank)

    def to(self, *args: Any, **kwargs: Any) -> "LoraFactors":
        return LoraFactors(self.A.to(*args, **kwargs), self.B.to(*args, **kwargs), self.scale)


class Outline(NamedTuple):
    """What is known of an adapter before any value is read. shapes: {module: (out, in), name of a tensor trained whole:
    its shape}. ranks: {module: rank of its factors}. scales: {module: their scale}, where that is known."""

    shapes: Mapping[str, tuple[int, ...]]
    ranks: Mapping[str, int]
    scales: Mapping[str, float] = {}


class AdapterState(Mapping[str, LoraFactors]):
    """{module name: LoraFactors}, in sorted order, plus `extras`: tensors trained whole, such as a classification head.

    `factors` may be any mapping; one that reads a module from disk when asked keeps a thousand clients out of memory.
    `outline`: of such a one, from the header of its file; None where only the values tell.
    """

    __slots__ = ("_factors", "_names", "extras", "outline")

    def __init__(
        self,
        factors: Mapping[str, LoraFactors],
        extras: Mapping[str, Tensor] | None = None,
        outline: Outline | None = None,
    ) -> None:
        if extras is None:
            extras = factors.extras if isinstance(factors, AdapterState) else {}
        self.outline = outline
        self._factors = factors
        self._names = tuple(sorted(factors))
        self.extras: Mapping[str, Tensor] = extras

    def __getitem__(self, module: str) -> LoraFactors:
        if module not in self:  # `_factors` may hold more: see `restricted`
            raise KeyError(module)
        return self._factors[module]

    def __contains__(self, module: object) -> bool:
        return module in self._names  # without reading it, as Mapping would

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def resident(self) -> bool:
        """Whether its factors are in memory, so that looking at all of them at once needs no more of it."""
        kept = self._factors
        return isinstance(kept, dict) or (isinstance(kept, AdapterState) and kept.resident)

    def rank(self, module: str) -> int:
        """The rank of a module's factors; they are read only where no outline tells it."""
        return self.outline.ranks[module] if self.outline is not None else self[module].rank

    def scale(self, module: str) -> float:
        """The scale of a module's factors; they are read only where no outline tells it."""
        known = {} if self.outline is None else self.outline.scales
        return known[module] if module in known else self[module].scale

    def __repr__(self) -> str:
        return f"AdapterState({len(self)} modules, {len(self.extras)} extras)"

    def in_memory(self) -> "AdapterState":
        """The same state with every tensor loaded."""
        return AdapterState(dict(self), dict(self.extras))

    def restricted(self, names: Container[str]) -> "AdapterState":
        """The same state with only these modules and extras; no module is read for it."""
        state = AdapterState(self._factors, {name: self.extras[name] for name in self.extras if name in names})
        state._names = tuple(name for name in self._names if name in names)
        return state

    def norm(self) -> float:
        """Frobenius norm of the whole update, all modules together (extras left out)."""
        return sum(factors.norm() ** 2 for factors in self.values()) ** 0.5

    def nbytes(self) -> int:
        """Bytes of every tensor, as sent over a wire in its own dtype."""
        tensors = [tensor for factors in self.values() for tensor in (factors.A, factors.B)]
        return sum(tensor.numel() * tensor.element_size() for tensor in [*tensors, *self.extras.values()])


def state_sum(*states: Mapping[str, LoraFactors]) -> AdapterState:
    """The exact sum of adapters with the same modules: ranks add up, extras are the last one's."""
    names = list(states[0])
    total = {}
    for name in names:
        total[name] = states[0][name]
        for state in states[1:]:
            total[name] = total[name] + state[name]
    last = states[-1]
    return AdapterState(total, last.extras if isinstance(last, AdapterState) else None)


def fitted(state: AdapterState, ranks: Mapping[str, int]) -> AdapterState:
    """`state` with every module of a higher rank than `ranks` says truncated to that; the others as they are."""
    factors = {}
    for module, own in state.items():
        rank = ranks.get(module, own.rank)
        factors[module] = own if own.rank <= rank else own.truncated(rank, own.scale)[0]
    return AdapterState(factors, state.extras)


def compressed(state: AdapterState) -> AdapterState:
    """The same update without idle rank: no module needs more than min(out, in), so nothing is lost."""
    factors = {m: f if f.rank <= min(f.shape) else f.truncated(min(f.shape), f.scale)[0] for m, f in state.items()}
    return AdapterState(factors, state.extras)


@dataclass(frozen=True, eq=False)
class ClientUpdate:
    """What one client sends: its adapter, and how many examples it was trained on (None: not known).

    The state is the whole adapter (relative to the frozen base model), not the change since the last round.
    control: its next control variate, {parameter: tensor}, where the run is SCAFFOLD's; see training/control.py.
    """

    client_id: str
    state: AdapterState
    num_examples: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    control: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.state, AdapterState):
            object.__setattr__(self, "state", AdapterState(self.state))


@dataclass(frozen=True, eq=False)
class Group:
    """Clients that have a global adapter of their own. state: it. clients: who starts from it and is judged in it,
    sorted. since: the round the group was found in, 0 from the start. within: mean cosine of two of its clients'
    changes in this round, as far as they came; between: the largest mean cosine to a group that it parted from now."""

    state: AdapterState
    clients: tuple[str, ...]
    since: int = 0
    within: float | None = None
    between: float | None = None


@dataclass(frozen=True, eq=False)
class Aggregate:
    """What a round's aggregation gives back.

    state: the global adapter.
    personalised: {client id: its refined adapter}, of the collaborative clients; empty when the method refines
        nothing (a client then keeps its own update). May be lazy: an adapter is computed when it is asked for.
    weights: {client id: weight in the global adapter}, summing to 1; 0 for a client left out.
    influence: {client id: what is left of its influence, 0 to 1}: less than 1 where the method lets a client count for
        less than its share; empty where it knows no such thing.
    suspicious: {client id: (kind of evidence, share of the way to its line)}, not flagged, near the line or turned.
    flagged: sound but judged contaminated. quarantined: {client id: reason}, unusable. Both sorted.
    claimed_weights: {client id: share of the examples it claims}, its weight in a mean that believes every claim.
    outlier_claims: {client id: one line} of those who claim far more examples than the others; what was made of it.
    evidence: {client id: {kind: Evidence}} that the flags rest on; see `numerics.evidence.Kind`.
    this_round: the same of this round alone, where `evidence` combines several; empty where it does not.
    modules: {module: {"rank", "spectrum", "discarded_energy", ...}}, plain numbers.
    diagnosis: what the method has to say about the whole cohort (identifiability, agreement), plain values.
    groups: {name: Group} where clients are aggregated group by group; `state` is then the first group's.
    """

    state: AdapterState
    personalised: Mapping[str, AdapterState] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    influence: Mapping[str, float] = field(default_factory=dict)
    suspicious: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    claimed_weights: Mapping[str, float] = field(default_factory=dict)
    outlier_claims: Mapping[str, str] = field(default_factory=dict)
    flagged: tuple[str, ...] = ()
    quarantined: Mapping[str, str] = field(default_factory=dict)
    evidence: Mapping[str, Mapping[str, Evidence]] = field(default_factory=dict)
    this_round: Mapping[str, Mapping[str, Evidence]] = field(default_factory=dict)
    modules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    diagnosis: Mapping[str, Any] = field(default_factory=dict)
    groups: Mapping[str, Group] = field(default_factory=dict)
    n_iter: int = 1
    converged: bool = True


def sorted_updates(updates: Iterable[ClientUpdate]) -> tuple[ClientUpdate, ...]:
    """The updates in the order of their ids, which is the order of every sum: a permuted cohort changes no bit."""
    return tuple(sorted(updates, key=lambda update: str(update.client_id)))
