"""Families of synthetic cohorts for the flag rule: those it was tuned on, and those kept aside to judge it by.

A cohort is {module: [W_1 ... W_K]}, K honest clients. Held-out families differ in kind, not only in seed: unequal norms
with heavy tails, mixed ranks and data sizes over two modules, groups that overlap with an honest minority, nested
subspaces, regressions with real estimation error, and mostly personal tasks. The weak families came later, with the
rule that uses a common direction however weak where it is well beyond chance: there the cosine of two honest clients
is 0.03 to 0.1, in three modules.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable

import torch
from torch import Tensor

from scripts.experiments.cohorts import IN, OUT, noise, normal, unit

Cohort = dict[str, list[Tensor]]
Family = Callable[[int, torch.Generator], Cohort]


def model(common: float, level: float, spread: float = 0.0, sizes: float = 0.0) -> Family:
    """U (common V_0 + V_k) + E_k; log noise level and log norm vary by `spread` and `sizes` (standard deviations)."""

    def make(K: int, g: torch.Generator) -> Cohort:
        U = torch.linalg.qr(normal(g, OUT, 3))[0]
        V0 = unit(normal(g, 3, IN))
        levels = level * (spread * normal(g, K)).exp()
        updates = [U @ (common * V0 + unit(normal(g, 3, IN))) + noise(g, float(s)) for s in levels]
        return {"W": [W * float(size) for W, size in zip(updates, (sizes * normal(g, K)).exp(), strict=True)]}

    return make


def clusters(common: float, same_subspace: bool) -> Family:
    """Three clusters of 60, 25 and 15 %, a common part of norm `common` beside the cluster's own of norm 1."""

    def make(K: int, g: torch.Generator) -> Cohort:
        U = torch.linalg.qr(normal(g, OUT, 3))[0]
        V0 = U @ unit(normal(g, 3, IN))
        own = [
            U @ unit(normal(g, 3, IN)) if same_subspace else unit(normal(g, OUT, 2) @ normal(g, 2, IN))
            for _ in range(3)
        ]
        which = torch.multinomial(torch.tensor([0.6, 0.25, 0.15]), K, True, generator=g).tolist()
        return {"W": [common * V0 + own[c] + noise(g, 0.3) for c in which]}

    return make


def mixtures(alpha: float | None, common: float) -> Family:
    """Dirichlet mixtures of 8 tasks (None: a task of its own for every client), a common part beside them."""

    def make(K: int, g: torch.Generator) -> Cohort:
        tasks = torch.stack([unit(normal(g, OUT, 2) @ normal(g, 2, IN)) for _ in range(8 if alpha else K)])
        V0 = unit(normal(g, OUT, 1) @ normal(g, 1, IN))
        if alpha is None:
            return {"W": [common * V0 + task + noise(g, 0.2) for task in tasks]}
        gamma = torch._standard_gamma(torch.full((K, 8), alpha, dtype=torch.float64), generator=g) + 1e-9
        parts = gamma / gamma.sum(1, keepdim=True)
        return {"W": [common * V0 + torch.einsum("t,tij->ij", p, tasks) + noise(g, 0.2) for p in parts]}

    return make


TUNING: dict[str, Family] = {
    "paper, noise 0": model(0, 0),
    "paper, noise 0.5": model(0, 0.5),
    "common 1, noise 1": model(1, 1),
    "common 2, noise 0.5": model(2, 0.5),
    "unequal noise": model(1, 0.5, spread=0.5),
    "unequal norms 0.3": model(1, 0.5, sizes=0.3),
    "unequal norms 0.6": model(1, 0.5, sizes=0.6),
    "clusters, one subspace": clusters(0.5, True),
    "clusters, common 1": clusters(1.0, False),
    "clusters, common 0.5": clusters(0.5, False),
    "Dirichlet 5": mixtures(5.0, 0.0),
    "Dirichlet 0.5": mixtures(0.5, 0.0),
    "Dirichlet 0.5, common 0.3": mixtures(0.5, 0.3),
    "Dirichlet 0.1": mixtures(0.1, 0.0),
    "Dirichlet 0.1, common 0.3": mixtures(0.1, 0.3),
    "one task each": mixtures(None, 0.0),
}


def heavy_norms(K: int, g: torch.Generator) -> Cohort:
    """The model with a common direction; log norms are 0.25 times Student's t with 3 degrees of freedom."""
    chi = normal(g, K, 3).square().mean(1).sqrt()
    sizes = (0.25 * normal(g, K) / chi).exp()
    return {"W": [W * float(s) for W, s in zip(model(1, 0.5)(K, g)["W"], sizes, strict=True)]}


def mixed_ranks(K: int, g: torch.Generator) -> Cohort:
    """Two modules; client k has n_k samples, log-uniform in 50 to 5000, noise 8 / sqrt(n_k), rank r_k in 2 to 32."""
    ranks = [2 ** int(e) for e in torch.randint(1, 6, (K,), generator=g)]
    levels = 8 / (50 * 100 ** torch.rand(K, generator=g, dtype=torch.float64)).sqrt()
    cohort = {}
    for module, (out, width) in {"a": (60, 40), "b": (64, 48)}.items():
        U, V0 = torch.linalg.qr(normal(g, out, 4))[0], unit(normal(g, 4, width))
        full = [U @ (V0 + unit(normal(g, 4, width))) + noise(g, float(s), out, width) for s in levels]
        cohort[module] = [_cut(W, r) for W, r in zip(full, ranks, strict=True)]
    return cohort


def _cut(W: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def overlapping(K: int, g: torch.Generator) -> Cohort:
    """Groups of 50, 25 and 25 % that mix tasks 0-3, 3-5 and (0, 5, 6): each pair of groups has one task in common."""
    tasks = [unit(normal(g, 60, 2) @ normal(g, 2, 40)) for _ in range(7)]
    groups = [(0, 1, 2, 3), (3, 4, 5), (0, 5, 6)]
    which = torch.multinomial(torch.tensor([0.5, 0.25, 0.25]), K, True, generator=g).tolist()
    updates = []
    for c in which:
        parts = 0.5 + torch.rand(len(groups[c]), generator=g, dtype=torch.float64)
        mixed = torch.stack([p * tasks[t] for p, t in zip(parts, groups[c], strict=True)]).sum(0)
        updates.append(unit(mixed) + noise(g, 0.3, 60, 40))
    return {"W": updates}


def nested(K: int, g: torch.Generator) -> Cohort:
    """U_1 in U_3 in U_6: 40, 35 and 25 % of the clients use the first 1, 3 or 6 of six directions."""
    U, V0 = torch.linalg.qr(normal(g, 60, 6))[0], normal(g, 6, 40)
    which = torch.multinomial(torch.tensor([0.4, 0.35, 0.25]), K, True, generator=g).tolist()
    sizes = [(1, 3, 6)[c] for c in which]
    return {"W": [unit(U[:, :d] @ (V0[:d] + normal(g, d, 40))) + noise(g, 0.4, 60, 40) for d in sizes]}


def regressions(K: int, g: torch.Generator) -> Cohort:
    """Ridge estimates (48 responses, 40 correlated features) of U (V_0 + 0.7 V_k) from 60 to 400 samples a client."""
    U, V0 = torch.linalg.qr(normal(g, 48, 3))[0], unit(normal(g, 3, 40))
    index = torch.arange(40, dtype=torch.float64)
    root = torch.linalg.cholesky(0.5 ** (index[:, None] - index).abs())
    updates = []
    for n in (60 * (400 / 60) ** torch.rand(K, generator=g, dtype=torch.float64)).long().tolist():
        X = normal(g, n, 40) @ root.T
        Y = X @ (U @ (V0 + 0.7 * unit(normal(g, 3, 40)))).T + 0.15 * normal(g, n, 48)
        updates.append(torch.linalg.solve(X.T @ X + torch.eye(40, dtype=X.dtype), X.T @ Y).T)
    return {"W": updates}


def personal(K: int, g: torch.Generator) -> Cohort:
    """A fifth of the energy in common (rank 2, one direction), the rest a task of the client's own of rank 4."""
    V0 = unit(normal(g, 96, 2) @ normal(g, 2, 32))
    own = [unit(normal(g, 96, 4) @ normal(g, 4, 32)) for _ in range(K)]
    return {"W": [0.2**0.5 * V0 + 0.8**0.5 * W + noise(g, 0.2, 96, 32) for W in own]}


def weak(K: int, g: torch.Generator, share: float = 0.07, groups: float = 0.0, spread: float = 0.0) -> Cohort:
    """Three modules; `share` of the energy in one common direction, `groups` in that of one of three groups (45, 30 and
    25 %), the rest the client's own, of rank 4; then noise, whose log level varies by `spread`."""
    which = torch.multinomial(torch.tensor([0.45, 0.3, 0.25]), K, True, generator=g).tolist()
    levels = 0.2 * (spread * normal(g, K)).exp()
    cohort = {}
    for module, (out, width) in {"a": (96, 64), "b": (64, 96), "c": (80, 80)}.items():
        common, *kinds = (unit(normal(g, out, 2) @ normal(g, 2, width)) for _ in range(4))
        own = [unit(normal(g, out, 4) @ normal(g, 4, width)) for _ in range(K)]
        cohort[module] = [
            share**0.5 * common
            + groups**0.5 * kinds[c]
            + (1 - share - groups) ** 0.5 * W
            + noise(g, float(level), out, width)
            for c, W, level in zip(which, own, levels, strict=True)
        ]
    return cohort


WEAK: dict[str, Family] = {
    "weak common direction": weak,
    "weak, and three groups": lambda K, g: weak(K, g, groups=0.1),
    "weak, unequal data": lambda K, g: weak(K, g, spread=0.8),
    "weaker": lambda K, g: weak(K, g, share=0.04),
}
HELD_OUT: dict[str, Family] = {
    "heavy-tailed norms": heavy_norms,
    "mixed ranks and data": mixed_ranks,
    "overlapping groups": overlapping,
    "nested subspaces": nested,
    "regressions": regressions,
    "mostly personal": personal,
}
