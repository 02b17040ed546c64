"""`Clair(...).fit(updates)`: the estimator for matrices or factor pairs in memory, and its frozen result."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from fedlora_hf.errors import UpdateError
from fedlora_hf.methods.clair import ClairOptions
from fedlora_hf.numerics import lowrank
from fedlora_hf.numerics.clair.blocks import stack
from fedlora_hf.numerics.clair.estimator import Solution, refined, solve
from fedlora_hf.numerics.clair.refine import Pair
from fedlora_hf.numerics.clair.source import Key
from fedlora_hf.numerics.evidence import Evidence
from fedlora_hf.util.side_by_side import LARGE

ONE_MODULE = "W"
Update = Tensor | Pair
V = TypeVar("V")
Updates = Sequence[Update] | Tensor | Mapping[str, Sequence[Update] | Tensor]


@dataclass(frozen=True, eq=False)
class ClairResult:
    """What CLAIR found. Clients are named by `ids`, modules by the keys given ("W" for a single one).

    subspace: {module: U (out, p)}, or (in, p) for side "input". rank: {module: p}. spectrum: {module: eigenvalues of
    the mean scatter of the unit-norm updates}. weights: {client: weight of the subspace fit, 0 for one left out}.
    shares: {client: weight in the mean}. influence: {client: what is left of its influence, 0 to 1}.
    evidence: {client: {kind: Evidence(score, threshold)}}.
    module_evidence: {module: {client: {kind: score}}}. collaborative, flagged: client ids, in order.
    diagnosis: plain values. global_update: {module: LowRank}, the mean over the collaborative clients.
    personalised: {client: {module: LowRank}} of the collaborative clients, computed when asked for; empty for
    refine "none".
    """

    ids: tuple[str, ...]
    subspace: Mapping[str, Tensor]
    spectrum: Mapping[str, Tensor]
    rank: Mapping[str, int]
    weights: Mapping[str, float]
    shares: Mapping[str, float]
    influence: Mapping[str, float]
    evidence: Mapping[str, Mapping[str, Evidence]]
    module_evidence: Mapping[str, Mapping[str, Mapping[str, float]]]
    collaborative: tuple[str, ...]
    flagged: tuple[str, ...]
    diagnosis: Mapping[str, object]
    global_update: Mapping[str, lowrank.LowRank]
    personalised: Mapping[str, Mapping[str, lowrank.LowRank]]
    n_iter: int
    converged: bool

    def matrix(self, client_id: str | None = None, module: str = ONE_MODULE) -> Tensor:
        """A client's refined update, or the global one (None), as a matrix (out, in)."""
        low = self.global_update[module] if client_id is None else self.personalised[client_id][module]
        return low.B @ low.A


@dataclass(frozen=True)
class Clair(ClairOptions):
    """CLAIR as an estimator: options as in `ClairOptions`, then `fit`."""

    def fit(
        self,
        updates: Updates,
        ids: Sequence[str] | None = None,
        weights: Sequence[float] | None = None,
        target_rank: int | None = None,
    ) -> ClairResult:
        """Fit to K clients' preliminary estimators; nothing is changed, a frozen result is returned.

        updates: K matrices (out, in), e.g. the coefficients of multi-response regressions, or K LoRA pairs (B (out, r),
            A (r, in)) with the scale folded in; or {module: such a list} for several modules.
        ids: names of the clients, default "0", "1", ... The result depends on the clients' ids, not on their order.
        weights: of the clients in the mean, default uniform. target_rank: of the global and refined updates;
            default as large as the given ones allow.

        Raises UpdateError (fewer than 3 clients, shapes that differ, NaN or Inf, repeated ids), ConfigError (rank).
        """
        names, given = _named(updates, ids)
        K = len(names)
        order = sorted(range(K), key=lambda k: names[k])
        shares = _shares(weights, K)[order]
        source = _InMemory({module: _stacked(module, [rows[k] for k in order]) for module, rows in given.items()})
        solution = solve(source, shares, target_rank, self)
        return _result(self, source, solution, [names[k] for k in order], names, target_rank)


@dataclass(frozen=True, eq=False)
class _InMemory:
    """A `Source` of stacked factors."""

    pairs: Mapping[str, Pair]

    @property
    def modules(self) -> Sequence[str]:
        return tuple(self.pairs)

    @property
    def keys(self) -> Sequence[Key]:
        return self.modules

    @property
    def restarted(self) -> bool:
        return True

    def change(self, key: Key) -> Pair:
        return self.pairs[str(key)]

    whole = change

    @property
    def large(self) -> bool:
        return max(B.numel() + A.numel() for B, A in self.pairs.values()) > LARGE

    def with_start(self, key: Key) -> Pair:
        raise NotImplementedError("matrices in memory are what was learned from nothing")


class LazyMapping(Mapping[str, V]):
    """{name: value}, each value computed when it is asked for and not kept."""

    def __init__(self, names: Sequence[str], compute: Callable[[str], V]) -> None:
        self._names, self._compute = tuple(names), compute

    def __getitem__(self, name: str) -> V:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _named(updates: Updates, ids: Sequence[str] | None) -> tuple[list[str], dict[str, list[Update]]]:
    modules = updates if isinstance(updates, Mapping) else {ONE_MODULE: updates}
    given = {module: list(modules[module]) for module in sorted(modules)}
    counts = {len(rows) for rows in given.values()}
    if len(counts) != 1:
        raise UpdateError(f"{len(given)} modules with {sorted(counts)} clients: all need the same; pass every client")
    K = counts.pop()
    names = [str(k) for k in range(K)] if ids is None else [str(name) for name in ids]
    if len(names) != K or len(set(names)) != K:
        raise UpdateError(f"{len(names)} ids, {len(set(names))} different, for {K} clients: need one each; rename them")
    return names, given


def _shares(weights: Sequence[float] | None, K: int) -> Tensor:
    shares = torch.ones(K, dtype=torch.float64) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    if shares.shape != (K,) or not bool((shares >= 0).all()) or not 0 < float(shares.sum()) < float("inf"):
        raise UpdateError(
            f"weights for {K} clients: must be {K} numbers from 0 on, not all 0; leave them out for uniform"
        )
    return shares / shares.sum()


def _stacked(module: str, rows: Sequence[Update]) -> Pair:
    """(B (K, out, r), A (K, r, in)), zero-padded; a matrix becomes (W, I) or (I, W), whichever is of lower rank."""
    pairs = [_pair(module, k, row) for k, row in enumerate(rows)]
    shapes = {(B.shape[0], A.shape[1]) for B, A in pairs}
    if len(shapes) > 1:
        raise UpdateError(f"{module}: updates of shapes {sorted(shapes)}; all clients need one shape, leave others out")
    double = any(part.dtype == torch.float64 for pair in pairs for part in pair)
    return stack(pairs, len(pairs), max(A.shape[0] for _, A in pairs), torch.float64 if double else None)


def _pair(module: str, k: int, row: Update) -> Pair:
    if isinstance(row, Tensor):
        if row.ndim != 2:
            raise UpdateError(
                f"{module}: client {k} has a tensor of shape {tuple(row.shape)}; pass (out, in) or (B, A)"
            )
        eye = torch.eye(min(row.shape), dtype=row.dtype)
        pair = (row, eye) if row.shape[1] <= row.shape[0] else (eye, row)
    else:
        pair = (row[0], row[1])
    B, A = pair
    if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
        raise UpdateError(
            f"{module}: client {k} has B {tuple(B.shape)} and A {tuple(A.shape)}; pass (out, r) and (r, in)"
        )
    if not bool(torch.isfinite(B).all()) or not bool(torch.isfinite(A).all()):
        raise UpdateError(f"{module}: client {k} has NaN or Inf; leave it out")
    return B.detach(), A.detach()


def _result(
    options: ClairOptions,
    source: _InMemory,
    solution: Solution,
    ids: Sequence[str],
    order: Sequence[str],
    target_rank: int | None,
) -> ClairResult:
    """Everything by name; clients in the caller's order."""
    row = {name: k for k, name in enumerate(ids)}
    flagged = solution.judgement.flagged
    collaborative = tuple(name for name in order if not flagged[row[name]])

    def of_client(name: str) -> Mapping[str, lowrank.LowRank]:
        return LazyMapping(source.modules, partial(of_module, name))

    def of_module(name: str, module: str) -> lowrank.LowRank:
        B, A = (part[row[name]] for part in source.whole(module))
        return refined(solution.fits[module], (B, A), options, target_rank or A.shape[0])

    names = collaborative if options.refine != "none" else ()
    fits = solution.fits
    return ClairResult(
        ids=tuple(order),
        subspace={module: fit.subspace for module, fit in fits.items()},
        spectrum={module: fit.spectrum for module, fit in fits.items()},
        rank={module: fit.rank for module, fit in fits.items()},
        weights={name: float(solution.weights[row[name]]) for name in order},
        shares={name: float(solution.shares[row[name]]) for name in order},
        influence={name: float(solution.kept[row[name]]) for name in order},
        evidence={name: solution.judgement.of(row[name]) for name in order},
        module_evidence={
            module: {name: {kind: float(s[row[name]]) for kind, s in kinds.items()} for name in order}
            for module, kinds in solution.module_scores.items()
        },
        collaborative=collaborative,
        flagged=tuple(name for name in order if flagged[row[name]]),
        diagnosis=solution.judgement.described(ids),
        global_update={module: turned_back(fit.total, options.side) for module, fit in fits.items()},
        personalised=LazyMapping(names, of_client),
        n_iter=solution.n_iter,
        converged=solution.converged,
    )


def turned_back(low: lowrank.LowRank, side: str) -> lowrank.LowRank:
    """The update itself, from that of the side looked at."""
    return low if side == "output" else low._replace(B=low.A.mT, A=low.B.mT)
