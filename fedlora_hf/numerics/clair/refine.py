"""The shared subspace at full accuracy, the robust mean, and the refined update of each client, in factor space.

    W~_k = M + U diag(g) U^T (W_k - M),   M the mean over the collaborative clients

g = 1 is the paper's refinement (in-subspace part kept, the rest averaged; the formula is our reading of the
abstract); 0 < g < 1 shrinks by signal to noise (our choice).
"""
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora_hf.numerics import lowrank
from fedlora_hf.numerics.clair.blocks import flat, generator

SPECTRUM = 64
# A mean of more columns than ITERATED is decomposed by iteration.
ITERATED, SPARE, PASSES, PROBES = 512, 16, 12, 32
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class ModuleFit:
    """One module's result.

    subspace: U (out, p). spectrum: eigenvalues of the mean scatter of unit-norm updates (shares of energy).
    gains: (p,). mean: M as (B, A), of more than the target rank, for refinement. total: M at the target rank.
    """

    subspace: Tensor
    spectrum: Tensor
    gains: Tensor
    mean: Pair
    total: lowrank.LowRank

    @property
    def rank(self) -> int:
        return int(self.subspace.shape[1])

    def refined(self, B: Tensor, A: Tensor) -> Pair:
        """(B, A) of the refined update, exact, of rank p + rank(M)."""
        U, (mean_B, mean_A) = self.subspace.double(), self.mean
        kept = self.gains[:, None] * ((U.T @ B.double()) @ A.double())
        off = mean_B - U @ (self.gains[:, None] * (U.T @ mean_B))
        return torch.cat([U, off], dim=1), torch.cat([kept, mean_A])


def scatter_times(B: Tensor, A: Tensor, weights: Tensor, U: Tensor) -> Tensor:
    """sum_k weights_k W_k W_k^T U, (out, p), from the factors alone."""
    inner = (A @ A.transpose(1, 2)) @ (B.transpose(1, 2) @ U)
    scaled = inner * weights.to(B)[:, None, None]
    return flat(B) @ scaled.reshape(-1, U.shape[1])


def leading(B: Tensor, A: Tensor, weights: Tensor, start: Tensor, mean: Pair | None = None, steps: int = 2) -> Pair:
    """(eigenvalues, largest first, eigenvectors (out, p)) of sum_k weights_k W_k W_k^T - M M^T, by subspace iteration
    from `start`, which comes from the compressed blocks: exact there when nothing was cut off."""
    U = torch.linalg.qr(start.to(B))[0]
    image = U
    for step in range(steps + 1):
        image = scatter_times(B, A, weights, U)
        if mean is not None:
            mean_B, mean_A = mean[0].to(B), mean[1].to(B)
            image = image - mean_B @ ((mean_A @ mean_A.T) @ (mean_B.T @ U))
        if step < steps:
            U = torch.linalg.qr(image)[0]
    values, turn = torch.linalg.eigh((U.T @ image).double())
    return values.flip(0).clamp_min(0), signed(U.double() @ turn.flip(1))


def signed(U: Tensor) -> Tensor:
    """Columns turned so that the largest entry of each is positive: equal subspaces give equal bytes."""
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
    return U * torch.where(sign == 0, torch.ones_like(sign), sign)


def mean_update(B: Tensor, A: Tensor, shares: Tensor, rank: int, extra: int) -> tuple[Pair, lowrank.LowRank]:
    """(M cut to rank + extra, M cut to rank) from one decomposition; shares (K,) sum to 1 over the clients kept.

    Exact (`lowrank.mean_truncated`) but for wide layers of many clients, where the leading part is found by iteration.
    """
    kept = shares.nonzero().squeeze(1).tolist()
    wide = min(len(kept) * A.shape[1], B.shape[1], A.shape[2])
    if wide > ITERATED and 8 * (rank + extra + SPARE) < wide:
        low = _leading_mean(flat(B[kept]), A[kept].flatten(0, 1), shares[kept], rank + extra)
    else:
        low = lowrank.mean_truncated([(B[k], A[k]) for k in kept], [float(shares[k]) for k in kept], rank + extra)
    cut = min(rank, low.B.shape[1])
    energy = low.spectrum.square()
    whole = float(energy[: low.B.shape[1]].sum()) / max(1 - low.discarded, 1e-12)
    lost = low.discarded + (float(energy[cut : low.B.shape[1]].sum()) / whole if whole > 0 else 0.0)
    return (low.B, low.A), lowrank.LowRank(low.B[:, :cut], low.A[:cut], low.spectrum, lost)


def _leading_mean(B: Tensor, A: Tensor, shares: Tensor, rank: int) -> lowrank.LowRank:
    """The leading part of M = B diag(shares) A, B (out, n) and A (n, in), by subspace iteration with SPARE directions
    more than asked for, until PASSES steps are done or the energy found stands still to 1e-6.

    What is discarded is measured on PROBES random vectors: to about sqrt(2 / (PROBES * effective rank of the rest)).
    """
    weight = shares.to(B).repeat_interleave(len(A) // len(shares))[:, None]
    start = torch.randn(A.shape[1], rank + SPARE, generator=generator(5), dtype=B.dtype)
    right, found = torch.linalg.qr(A.T @ (weight * (A @ start)))[0], 0.0
    for _ in range(PASSES):
        left = torch.linalg.qr(B @ (weight * (A @ right)))[0]
        image = A.T @ (weight * (B.T @ left))
        energy = float(image.double().square().sum())
        if energy <= found * (1 + 1e-6):
            break
        right, found = torch.linalg.qr(image)[0], energy
    U, S, Vh = torch.linalg.svd(image.T.double(), full_matrices=False)
    probes = torch.randn(A.shape[1], PROBES, generator=generator(6), dtype=B.dtype)
    rest = B @ (weight * (A @ probes))
    rest = rest - left @ (left.T @ rest)
    energies = S.square()
    lost = float(energies[rank:].sum()) + float(rest.double().square().sum()) / PROBES
    total = float(energies[:rank].sum()) + lost
    root = S[:rank].sqrt()
    out = signed(left.double() @ U[:, :rank])
    turned = (out.T @ (left.double() @ U[:, :rank])).diagonal()
    return lowrank.LowRank(out * root, (turned * root)[:, None] * Vh[:rank], S, lost / total if total > 0 else 0.0)


def soft_gains(values: Tensor, total: float, places: int) -> Tensor:
    """g_i = (1 - sigma2 / lambda_i)_+ from between-client eigenvalues: sigma2 is their mean outside the p largest.

    total: trace of the between-client scatter; places: its rank, min(out, sum of ranks).
    """
    left = max(total - float(values.sum()), 0.0) / max(places - len(values), 1)
    return (1 - left / values.clamp_min(1e-300)).clamp_min(0)
