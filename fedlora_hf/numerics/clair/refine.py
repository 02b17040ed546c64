"""The shared subspace at full accuracy, the robust mean, and the refined update of each client, in factor space.

    W~_k = M + U diag(g) U^T (W_k - M),   M the mean over the collaborative clients

Functions on factors take several modules of one shape at once as well, by a leading dimension (see `blocks`).

g = 1 is the paper's refinement (in-subspace part kept, the rest averaged; the formula is our reading of the
abstract); 0 < g < 1 shrinks by signal to noise (our choice).
"""
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedlora_hf.numerics import lowrank, many
from fedlora_hf.numerics.clair.blocks import Grams, drawn_like, flat
from fedlora_hf.numerics.small import eigh, orthonormal, svd

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
    columns, grams = flat(B), (A @ A.mT) * weights.to(A)[..., None, None]
    mean_B, mean_A = (torch.empty(0), torch.empty(0)) if mean is None else (mean[0].to(B), mean[1].to(B))
    U = orthonormal(start.to(B))
    image = U
    for step in range(steps + 1):
        image = columns @ (grams @ (columns.mT @ U).reshape(*A.shape[:-1], -1)).flatten(-3, -2)
        if mean is not None:
            image = image - mean_B @ ((mean_A @ mean_A.mT) @ (mean_B.mT @ U))
        if step < steps:
            U = orthonormal(image)
    values, turn = eigh((U.mT @ image).double())
    return values.flip(-1).clamp_min(0), signed(U.double() @ turn.flip(-1))


def leading_by_grams(B: Tensor, grams: Grams, weights: Tensor, start: Tensor, steps: int = 2) -> Tensor:
    """The eigenvectors (out, p) that `leading` finds, from B @ start, start (n, p), by the Gram matrices of B (out, n)
    and A: B is read once, at the end."""
    own = grams.own("A", weights.shape[-1]).double()
    inner, outer = own * weights.to(own)[..., None, None], grams.B.double()
    Z = image = start.double()
    for _ in range(steps + 1):
        Z = _whitened(image, outer)
        image = (inner @ (outer @ Z).reshape(*own.shape[:-1], -1)).flatten(-3, -2)
    turn = eigh(Z.mT @ (outer @ image))[1].flip(-1)
    return signed(orthonormal((B @ (Z @ turn).to(B)).double()))


def _whitened(Z: Tensor, gram: Tensor) -> Tensor:
    """Columns of the same span with Z^T gram Z = 1: once to part directions, once more for the small ones."""
    for _ in range(2):
        Z = Z / torch.linalg.vector_norm(Z, dim=-2, keepdim=True).clamp_min(1e-30)
        values, vectors = eigh((Z.mT @ (gram @ Z)).double())
        top = values[..., -1:].clamp_min(1e-30)
        # A column of zeros (see `fits`) stays one: what rounding mixes into it is not to be made large.
        scale = torch.where(values.abs() <= 1e-14 * top, 0.0, torch.maximum(values, 1e-7 * top).rsqrt())
        Z = (Z.double() @ (vectors * scale[..., None, :])).to(gram)
    return Z


def signed(U: Tensor) -> Tensor:
    """Columns turned so that the largest entry of each is positive: equal subspaces give equal bytes."""
    return U * signs(U)[..., None, :]


def signs(U: Tensor) -> Tensor:
    """(p,) of 1 and -1: the sign of each column's largest entry."""
    largest = U.gather(-2, U.abs().argmax(-2, keepdim=True))[..., 0, :]
    return torch.where(largest < 0, -torch.ones_like(largest), torch.ones_like(largest))


def mean_update(
    B: Tensor, A: Tensor, shares: Tensor, rank: int, extra: int, grams: Grams | None = None
) -> tuple[Pair, lowrank.LowRank]:
    """(M cut to rank + extra, M cut to rank) from one decomposition; shares (K,) sum to 1 over the clients kept.

    Exact (`lowrank.mean_truncated`) but for wide layers of many clients, where the leading part is found by iteration.
    grams: of B's and A's columns, where they are known.
    """
    kept = shares.nonzero().squeeze(1).tolist()
    if _iterated(B, A, len(kept), rank + extra):
        if len(kept) < len(shares) and grams is None:
            B, A, shares = B.permute(1, 0, 2)[:, kept].permute(1, 0, 2), A[kept], shares[kept]
        found = _leading_mean(flat(B), A.flatten(0, 1), shares, rank + extra, grams)
        low = lowrank.LowRank(*found[:3], _share(found.kept, found.lost))
    else:
        low = lowrank.mean_truncated([(B[k], A[k]) for k in kept], [float(shares[k]) for k in kept], rank + extra)
    return _cut(low, rank)


def mean_updates(B: Tensor, A: Tensor, shares: Tensor, rank: int, extra: int) -> list[tuple[Pair, lowrank.LowRank]]:
    """`mean_update` of several modules at once, exact: B (M, K, out, r), A (M, K, r, in), shares (M, K); on the CPU.

    On a GPU the best approximation costs less than a Krylov space; where the spectrum has no gap at the rank asked
    for, the two differ by what the Krylov space leaves.
    """
    kept = (shares > 0).any(0).nonzero().squeeze(1).to(B.device)
    weighted = B[:, kept].double() * shares.to(B.device)[:, kept, None, None]
    lows = many.means_truncated(flat(weighted), A[:, kept].double().flatten(1, 2), rank + extra)
    return [_cut(low, rank) for low in lows]


def _iterated(B: Tensor, A: Tensor, K: int, rank: int) -> bool:
    """Whether the mean of K clients is wide enough, for its rank, to be found by iteration."""
    wide = min(K * A.shape[-2], B.shape[-2], A.shape[-1])
    return wide > ITERATED and 8 * (rank + SPARE) < wide


def _cut(low: lowrank.LowRank, rank: int) -> tuple[Pair, lowrank.LowRank]:
    """(the whole of it, cut to a rank below its own)."""
    cut = min(rank, low.B.shape[1])
    energy = low.spectrum.square()
    whole = float(energy[: low.B.shape[1]].sum()) / max(1 - low.discarded, 1e-12)
    lost = low.discarded + (float(energy[cut : low.B.shape[1]].sum()) / whole if whole > 0 else 0.0)
    return (low.B, low.A), lowrank.LowRank(low.B[:, :cut], low.A[:cut], low.spectrum, lost)


class _Mean(NamedTuple):
    """The leading part of a mean: B (out, rank), A (rank, in), the singular values S found, squared norms of what is
    kept and of what is lost, all tensors."""

    B: Tensor
    A: Tensor
    S: Tensor
    kept: Tensor
    lost: Tensor


def _share(kept: Tensor, lost: Tensor) -> float:
    """What is lost, as a share of all."""
    best, rest = float(kept), max(float(lost), 0.0)
    return rest / (best + rest) if best > 0 else 0.0


def _leading_mean(B: Tensor, A: Tensor, shares: Tensor, rank: int, grams: Grams | None) -> _Mean:
    """The leading part of M = B diag(shares) A, B (out, n) and A (n, in): the best of the block Krylov space of M^T M
    with rank + SPARE random columns and POWERS powers (Musco & Musco 2015, arXiv 1504.05477).

    What is discarded is known from the Gram matrices, or else measured on PROBES random vectors: to about
    sqrt(2 / (PROBES * effective rank of the rest)).
    """
    weight = shares.to(B).repeat_interleave(A.shape[-2] // shares.shape[-1], dim=-1)[..., None]
    images = (
        _krylov(B, A, weight, rank + SPARE) if grams is None else _krylov_by_grams(B, A, weight, rank + SPARE, grams)
    )
    left = orthonormal(images)
    right, core = torch.linalg.qr(A.mT @ (weight * (B.mT @ left)))
    U, S, Vh = svd(core.mT.double())
    out = left.double() @ U[..., :rank]
    turn = signs(out)
    energies, root = S.square(), S[..., :rank].sqrt()
    best = energies[..., :rank].sum(-1)
    if grams is None:
        rest = B @ (weight * (A @ drawn_like(B, (A.shape[-1], PROBES), 6)))
        rest = rest - left @ (left.mT @ rest)
        lost = energies[..., rank:].sum(-1) + rest.double().square().sum((-2, -1)) / PROBES
    else:
        lost = (weight * weight.mT * grams.B * grams.A).sum((-2, -1), dtype=torch.float64) - best
    inward = root[..., None] * (Vh[..., :rank, :] @ right.double().mT)
    return _Mean(out * (turn * root)[..., None, :], turn[..., None] * inward, S, best, lost)


def _krylov(B: Tensor, A: Tensor, weight: Tensor, width: int) -> Tensor:
    """(out, (1 + POWERS) width) columns that span the Krylov space of M M^T from M times `width` random columns."""
    block = drawn_like(B, (A.shape[-1], width), 5)
    block = orthonormal(A.mT @ (weight * (A @ block)))
    images = [B @ (weight * (A @ block))]
    for _ in range(POWERS):
        block = orthonormal(A.mT @ (weight * (B.mT @ images[-1])))
        images.append(B @ (weight * (A @ block)))
    return torch.cat(images, dim=-1)


def _krylov_by_grams(B: Tensor, A: Tensor, weight: Tensor, width: int, grams: Grams) -> Tensor:
    """The same from one pass over A and one over B: in between a block A^T Y is its Y, an image B Z its Z."""
    Y, images = weight * (A @ drawn_like(B, (A.shape[-1], width), 5)), []
    for _ in range(POWERS + 1):
        images.append(weight * (grams.A @ _whitened(Y, grams.A)))
        Y = weight * (grams.B @ images[-1])
    return B @ torch.cat(images, dim=-1)


def soft_gains(values: Tensor, total: float, places: int) -> Tensor:
    """g_i = (1 - sigma2 / lambda_i)_+ from between-client eigenvalues: sigma2 is their mean outside the p largest.

    total: trace of the between-client scatter; places: its rank, min(out, sum of ranks).
    """
    left = max(total - float(values.sum()), 0.0) / max(places - len(values), 1)
    return (1 - left / values.clamp_min(1e-300)).clamp_min(0)
