"""Synthetic cohorts for the experiments: clients that share a subspace, ways to contaminate, rules to compare with."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora_hf.util.seeding import derive_seed

OUT, IN, RANK = 48, 40, 3


def generator(*path: str | int) -> torch.Generator:
    """One generator for one cohort."""
    return torch.Generator().manual_seed(derive_seed(0, *path) % 2**62)


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def unit(W: Tensor) -> Tensor:
    return W / W.norm()


def noise(g: torch.Generator, level: float, out: int = OUT, width: int = IN) -> Tensor:
    """A dense matrix of norm about `level`."""
    return level * normal(g, out, width) / (out * width) ** 0.5


@dataclass(frozen=True)
class Truth:
    """updates (K, out, in), the true subspace U (out, r), the contaminated clients' indices."""

    updates: list[Tensor]
    subspace: Tensor
    bad: frozenset[int]


def shared(
    K: int, bad: int, kind: str, g: torch.Generator, level: float = 0.0, common: float = 0.0, share: float = 1.0
) -> Truth:
    """The paper's model, W_k = U (common V_0 + V_k) + E_k with ||U V_k|| = 1 and ||E_k|| = level.

    The last `bad` clients are contaminated by `kind`, with only part of their update wrong when share < 1."""
    U = torch.linalg.qr(normal(g, OUT, RANK))[0]
    V0 = unit(normal(g, RANK, IN))
    clean = [U @ (common * V0 + unit(normal(g, RANK, IN))) for _ in range(K)]
    wrong = CONTAMINATIONS[kind](clean[: K - bad], clean[K - bad :], g)
    mixed = [(1 - share**2) ** 0.5 * c + share * w for c, w in zip(clean[K - bad :], wrong, strict=True)]
    updates = [W + noise(g, level) if bool(W.any()) else W for W in clean[: K - bad] + mixed]
    return Truth(updates, U, frozenset(range(K - bad, K)))


def _gaussian(honest: list[Tensor], own: list[Tensor], g: torch.Generator) -> list[Tensor]:
    return [unit(normal(g, *W.shape)) * W.norm() for W in own]


def _own_subspace(honest: list[Tensor], own: list[Tensor], g: torch.Generator) -> list[Tensor]:
    return [unit(normal(g, W.shape[0], RANK) @ normal(g, RANK, W.shape[1])) * W.norm() for W in own]


def _colluding(honest: list[Tensor], own: list[Tensor], g: torch.Generator) -> list[Tensor]:
    wrong = torch.linalg.qr(normal(g, own[0].shape[0], RANK))[0]
    return [wrong @ unit(normal(g, RANK, W.shape[1])) * W.norm() for W in own]


def _coherent(honest: list[Tensor], own: list[Tensor], g: torch.Generator) -> list[Tensor]:
    wrong = unit(normal(g, own[0].shape[0], 1) @ normal(g, 1, own[0].shape[1]))
    return [wrong * W.norm() for W in own]


def _little(honest: list[Tensor], own: list[Tensor], g: torch.Generator) -> list[Tensor]:
    stack = torch.stack(honest)
    return [stack.mean(0) - 1.5 * stack.std(0) for _ in own]


Contamination = Callable[[list[Tensor], list[Tensor], torch.Generator], list[Tensor]]
CONTAMINATIONS: dict[str, Contamination] = {
    "gaussian": _gaussian,
    "own subspace": _own_subspace,
    "colluding": _colluding,
    "coherent": _coherent,
    "little is enough": _little,
    "boost x10": lambda honest, own, g: [10 * W for W in own],
    "zero": lambda honest, own, g: [0 * W for W in own],
    "sign flip": lambda honest, own, g: [-W for W in own],
}


def inner_products(updates: list[Tensor]) -> Tensor:
    flat = torch.stack(updates).flatten(1)
    return flat @ flat.T


def krum_set(updates: list[Tensor], bad: int) -> frozenset[int]:
    """The `bad` clients of largest Krum score on unit-norm updates; told how many there are, unlike CLAIR."""
    flat = torch.stack([unit(W) for W in updates]).flatten(1)
    nearest = torch.cdist(flat, flat).square().sort(1).values[:, 1 : max(len(updates) - bad - 1, 2)].sum(1)
    return _largest(nearest, bad)


def median_set(updates: list[Tensor], bad: int) -> frozenset[int]:
    """The `bad` clients farthest from the coordinate-wise median of unit-norm updates; told how many there are."""
    stack = torch.stack([unit(W) for W in updates])
    return _largest((stack - stack.median(0).values).flatten(1).norm(dim=1), bad)


def _largest(scores: Tensor, count: int) -> frozenset[int]:
    return frozenset(scores.argsort(descending=True, stable=True)[:count].tolist())
