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
from fedlora_hf.numerics.clair.blocks import Grams, drawn_like, flat
from fedlora_hf.numerics.small import eigh

SPECTRUM = 64
# A mean of more columns than ITERATED is decomposed in a Krylov space.
ITERATED, SPARE, POWERS, PROBES = 512, 8, 2, 32
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

    def cpu(self) -> "ModuleFit":
        """The same on the CPU, where clients' adapters are refined one by one."""
        low = self.total
        return ModuleFit(
            self.subspace.cpu(),
            self.spectrum.cpu(),
            self.gains.cpu(),
            (self.mean[0].cpu(), self.mean[1].cpu()),
            low._replace(B=low.B.cpu(), A=low.A.cpu(), spectrum=low.spectrum.cpu()),
        )

    def refined(self, B: Tensor, A: Tensor) -> Pair:
        """(B, A) of the refined update, exact, of rank p + rank(M)."""
        U, (mean_B, mean_A) = self.subspace.double(), self.mean
        kept = self.gains[:, None] * ((U.T @ B.double()) @ A.double())
        off = mean_B - U @ (self.gains[:, None] * (U.T @ mean_B))
        return torch.cat([U, off], dim=1), torch.cat([kept, mean_A])


def leading(B: Tensor, A: Tensor, weights: Tensor, start: Tensor, mean: Pair | None = None, steps: int = 2) -> Pair:
    """(eigenvalues, largest first, eigenvectors (out, p)) of sum_k weights_k W_k W_k^T - M M^T, by subspace iteration
    from `start`, which comes from the compressed blocks: exact there when nothing was cut off."""
    columns, grams = flat(B), (A @ A.transpose(1, 2)) * weights.to(A)[:, None, None]
    mean_B, mean_A = (torch.empty(0), torch.empty(0)) if mean is None else (mean[0].to(B), mean[1].to(B))
    U = torch.linalg.qr(start.to(B))[0]
    image = U
    for step in range(steps + 1):
        image = columns @ (grams @ (columns.T @ U).reshape(len(A), A.shape[1], -1)).flatten(0, 1)
        if mean is not None:
            image = image - mean_B @ ((mean_A @ mean_A.T) @ (mean_B.T @ U))
        if step < steps:
            U = torch.linalg.qr(image)[0]
    values, turn = eigh((U.T @ image).double())
    return values.flip(0).clamp_min(0), signed(U.double() @ turn.flip(1))


def leading_by_grams(B: Tensor, grams: Grams, weights: Tensor, start: Tensor, steps: int = 2) -> Tensor:
    """The eigenvectors (out, p) that `leading` finds, from B @ start, start (n, p), by the Gram matrices of B (out, n)
    and A: B is read once, at the end."""
    K, n = len(weights), B.shape[1]
    own = grams.A.reshape(K, n // K, K, n // K).diagonal(dim1=0, dim2=2).permute(2, 0, 1).double()
    inner, outer = own * weights.to(own)[:, None, None], grams.B.double()
    Z = image = start.double()
    for _ in range(steps + 1):
        Z = _whitened(image, outer)
        image = (inner @ (outer @ Z).reshape(K, n // K, -1)).flatten(0, 1)
    turn = eigh(Z.T @ (outer @ image))[1].flip(1)
    return signed(torch.linalg.qr((B @ (Z @ turn).to(B)).double())[0])


def _whitened(Z: Tensor, gram: Tensor) -> Tensor:
    """Columns of the same span with Z^T gram Z = 1: once to part directions, once more for the small ones."""
    for _ in range(2):
        Z = Z / torch.linalg.vector_norm(Z, dim=0).clamp_min(1e-30)
        values, vectors = eigh((Z.T @ (gram @ Z)).double())
        Z = (Z.double() @ (vectors * values.clamp_min(1e-7 * float(values[-1].clamp_min(1e-30))).rsqrt())).to(gram)
    return Z


def signed(U: Tensor) -> Tensor:
    """Columns turned so that the largest entry of each is positive: equal subspaces give equal bytes."""
    return U * signs(U)


def signs(U: Tensor) -> Tensor:
    """(p,) of 1 and -1: the sign of each column's largest entry."""
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -torch.ones_like(largest), torch.ones_like(largest))


def mean_update(
    B: Tensor, A: Tensor, shares: Tensor, rank: int, extra: int, grams: Grams | None = None
) -> tuple[Pair, lowrank.LowRank]:
    """(M cut to rank + extra, M cut to rank) from one decomposition; shares (K,) sum to 1 over the clients kept.

    Exact (`lowrank.mean_truncated`) but for wide layers of many clients, where the leading part is found by iteration.
    grams: of B's and A's columns, where they are known.
    """
    kept = shares.nonzero().squeeze(1).tolist()
    wide = min(len(kept) * A.shape[1], B.shape[1], A.shape[2])
    if wide > ITERATED and 8 * (rank + extra + SPARE) < wide:
        if len(kept) < len(shares) and grams is None:
            B, A, shares = B.permute(1, 0, 2)[:, kept].permute(1, 0, 2), A[kept], shares[kept]
        low = _leading_mean(flat(B), A.flatten(0, 1), shares, rank + extra, grams)
    else:
        low = lowrank.mean_truncated([(B[k], A[k]) for k in kept], [float(shares[k]) for k in kept], rank + extra)
    cut = min(rank, low.B.shape[1])
    energy = low.spectrum.square()
    whole = float(energy[: low.B.shape[1]].sum()) / max(1 - low.discarded, 1e-12)
    lost = low.discarded + (float(energy[cut : low.B.shape[1]].sum()) / whole if whole > 0 else 0.0)
    return (low.B, low.A), lowrank.LowRank(low.B[:, :cut], low.A[:cut], low.spectrum, lost)


def _leading_mean(B: Tensor, A: Tensor, shares: Tensor, rank: int, grams: Grams | None) -> lowrank.LowRank:
    """The leading part of M = B diag(shares) A, B (out, n) and A (n, in): the best of the block Krylov space of M^T M
    with rank + SPARE random columns and POWERS powers (Musco & Musco 2015, arXiv 1504.05477).

    What is discarded is known from the Gram matrices, or else measured on PROBES random vectors: to about
    sqrt(2 / (PROBES * effective rank of the rest)).
    """
    weight = shares.to(B).repeat_interleave(len(A) // len(shares))[:, None]
    images = (
        _krylov(B, A, weight, rank + SPARE) if grams is None else _krylov_by_grams(B, A, weight, rank + SPARE, grams)
    )
    left = torch.linalg.qr(images)[0]
    right, core = torch.linalg.qr(A.T @ (weight * (B.T @ left)))
    U, S, Vh = torch.linalg.svd(core.T.double(), full_matrices=False)
    out = left.double() @ U[:, :rank]
    turn = signs(out)
    energies, root = S.square(), S[:rank].sqrt()
    best = float(energies[:rank].sum())
    if grams is None:
        rest = B @ (weight * (A @ drawn_like(B, (A.shape[1], PROBES), 6)))
        rest = rest - left @ (left.T @ rest)
        lost = float(energies[rank:].sum()) + float(rest.double().square().sum()) / PROBES
    else:
        lost = max(float((weight * weight.T * grams.B * grams.A).sum(dtype=torch.float64)) - best, 0.0)
    inward = root[:, None] * (Vh[:rank] @ right.double().T)
    return lowrank.LowRank(out * (turn * root), turn[:, None] * inward, S, lost / (best + lost) if best > 0 else 0.0)


def _krylov(B: Tensor, A: Tensor, weight: Tensor, width: int) -> Tensor:
    """(out, (1 + POWERS) width) columns that span the Krylov space of M M^T from M times `width` random columns."""
    block = drawn_like(B, (A.shape[1], width), 5)
    block = torch.linalg.qr(A.T @ (weight * (A @ block)))[0]
    images = [B @ (weight * (A @ block))]
    for _ in range(POWERS):
        block = torch.linalg.qr(A.T @ (weight * (B.T @ images[-1])))[0]
        images.append(B @ (weight * (A @ block)))
    return torch.cat(images, dim=1)


def _krylov_by_grams(B: Tensor, A: Tensor, weight: Tensor, width: int, grams: Grams) -> Tensor:
    """The same from one pass over A and one over B: in between a block A^T Y is its Y, an image B Z its Z."""
    Y, images = weight * (A @ drawn_like(B, (A.shape[1], width), 5)), []
    for _ in range(POWERS + 1):
        images.append(weight * (grams.A @ _whitened(Y, grams.A)))
        Y = weight * (grams.B @ images[-1])
    return B @ torch.cat(images, dim=1)


def soft_gains(values: Tensor, total: float, places: int) -> Tensor:
    """g_i = (1 - sigma2 / lambda_i)_+ from between-client eigenvalues: sigma2 is their mean outside the p largest.

    total: trace of the between-client scatter; places: its rank, min(out, sum of ranks).
    """
    left = max(total - float(values.sum()), 0.0) / max(places - len(values), 1)
    return (1 - left / values.clamp_min(1e-300)).clamp_min(0)
