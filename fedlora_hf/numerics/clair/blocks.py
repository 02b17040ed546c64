"""One module's updates made small: block coordinates in a common basis, and inner products of the products.

Every function also takes several modules of one shape at once, by a leading dimension of all its tensors: one launch on
a GPU for what would be many. Of one module, without that dimension, the arithmetic is that of plain matrices.

An update W_k = B_k A_k enters subspace questions only through X_k with X_k X_k^T = W_k W_k^T. The stack [X_1 ... X_K]
is kept as coordinates in a basis of at most `WIDTH` directions, so that what stays in memory between two passes over
the clients does not depend on the width of the layer.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fedlora_hf.numerics.gram import gram_of
from fedlora_hf.numerics.small import eigh, orthonormal

# Basis directions kept per module: more for few clients; for many, a shared direction stands out of the others by
# the number of clients that use it, so fewer do.
WIDTH, WIDTH_MANY, MANY = 192, 64, 200
# Largest stacked rank for which all pairs are compared exactly; beyond it, through a random projection.
GRAM_LIMIT = 1024
SKETCH = 64
STRANGERS = 32  # clients whose chance agreement is looked at
SMALL = 2_000_000  # numbers in a stack that is worth float64


class Grams(NamedTuple):
    """B^T B and A A^T, both (K r, K r), of the clients' factors side by side."""

    B: Tensor
    A: Tensor

    def own(self, side: str, K: int) -> Tensor:
        """(K, r, r): each client's own block of one of the two."""
        gram = self.B if side == "B" else self.A
        blocks = gram.unflatten(-1, (K, -1)).unflatten(-3, (K, -1))
        return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


@dataclass(frozen=True, eq=False)
class Blocks:
    """basis: (out, d) orthonormal, None for the identity (d = out). coords: (K, d, r), unit-energy clients:
    coords_k = basis^T X_k / ||W_k||. energy: (K,) = ||W_k||^2, exact. out: dimension of the judged side.

    Exact when d reaches min(out, sum of ranks); otherwise energy outside the basis counts as not shared.
    Of a large layer `grams` are kept and, in place of the basis, `inward` (K r, d): the basis is flat(B) @ inward.
    coords and energy, which the solver works on, are on the CPU; the rest is where the factors were.
    """

    basis: Tensor | None
    coords: Tensor
    energy: Tensor
    out: int
    inward: Tensor | None = None
    grams: Grams | None = None

    def apart(self, count: int) -> "list[Blocks]":
        """Of `count` modules at once, one by one. Columns of `inward` that stand for nothing are left out."""
        found = []
        for m in range(count):
            one = Blocks(None if self.basis is None else self.basis[m], self.coords[m], self.energy[m], self.out)
            if self.inward is not None and self.grams is not None:
                kept = self.coords[m].abs().amax((0, 2)).nonzero().squeeze(1)
                inward = self.inward[m][:, kept.to(self.inward.device)]
                grams = Grams(self.grams.B[m], self.grams.A[m])
                one = replace(one, coords=one.coords[:, kept], inward=inward, grams=grams)
            found.append(one)
        return found


def stack(
    pairs: Iterable[tuple[Tensor, Tensor]],
    count: int,
    rank: int,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(B (count, out, rank), A (count, rank, in)) of pairs that come one at a time, zero-padded to `rank`.

    dtype: by default that of `dtype_of`. On the first pair's device.
    """
    B = A = torch.empty(0)
    for k, (left, right) in enumerate(pairs):
        if k == 0:
            size = count * rank * (left.shape[0] + right.shape[1])
            dtype = dtype or dtype_of(size)
            B = torch.empty(left.shape[0], count, rank, dtype=dtype, device=left.device)
            B = B.permute(1, 0, 2)  # `flat` then copies nothing
            A = torch.empty(count, rank, right.shape[1], dtype=dtype, device=left.device)
        own = left.shape[1]
        B[k, :, :own], A[k, :own] = left, right
        if own < rank:
            B[k, :, own:], A[k, own:] = 0, 0
    return B, A


def dtype_of(size: int) -> torch.dtype:
    """What a stack of so many numbers is worked on in: float64 for what is small, float32 for large layers."""
    return torch.float64 if size <= SMALL else torch.float32


def flat(X: Tensor) -> Tensor:
    """(K, out, r) -> (out, K r), clients side by side."""
    return X.movedim(-3, -2).flatten(-2)


def roots(A: Tensor) -> Tensor:
    """(K, r, r) R_k with A_k A_k^T = R_k R_k^T, so that X_k = B_k R_k. In float64 inside."""
    A = A if A.dtype == torch.float64 else A.float()
    values, vectors = eigh((A @ A.mT).double())
    return (vectors * values.clamp_min(0).sqrt()[..., None, :]).to(A.dtype)


def generator(seed: int = 0) -> torch.Generator:
    """Fixed seed: a projection is part of the method's definition, not a random choice of the run."""
    return torch.Generator().manual_seed(seed)


def drawn_like(X: Tensor, shape: tuple[int, ...], seed: int) -> Tensor:
    """Gaussian numbers in the dtype and on the device of X: drawn on the CPU, so that every device has the same."""
    return torch.randn(*shape, generator=generator(seed), dtype=X.dtype).to(X.device)


def summarise(B: Tensor, A: Tensor, keep: bool = True) -> tuple[Blocks, Tensor, Tensor]:
    """(blocks, inner products (K, K), the same by chance) of one module from B (K, out, r) and A (K, r, in).

    By chance: of at most STRANGERS of the clients, evenly spaced, each with the signs of its input coordinates
    drawn afresh: what the same updates' inner products would be if nobody pointed where another does.
    keep: whether the Gram matrices of a large layer are of use later.
    """
    K, _, r = B.shape[-3:]
    part = by_chance(K)
    grams = among = None
    if K * r <= GRAM_LIMIT and not _is_wide(B, A):
        grams = Grams(gram_of(flat(B)), gram_of(A.flatten(-3, -2).mT))
        among = grams.B.unflatten(-1, (K, r)).unflatten(-3, (K, r))[..., part, :, part, :].flatten(-4, -3).flatten(-2)
    sign = torch.randint(0, 2, (A.shape[-1],), generator=generator(4)).to(A) * 2 - 1
    signs = torch.stack([sign.roll(k) for k in range(len(range(K)[part]))])
    null = inner_products(B[..., part, :, :], A[..., part, :, :] * signs[:, None, :], among)
    inner = inner_products(B, A, None) if grams is None else _of_clients(grams.B * grams.A, K)
    found = _blocks(B, roots(A), grams, keep and B.dtype == torch.float32)
    found = replace(found, coords=found.coords.cpu(), energy=found.energy.cpu())
    return found, inner.double().cpu(), null.double().cpu()


def _of_clients(products: Tensor, K: int) -> Tensor:
    """(K r, K r) -> (K, K): the sum of each pair's block."""
    return products.unflatten(-1, (K, -1)).unflatten(-3, (K, -1)).sum((-3, -1))


def by_chance(K: int) -> slice:
    """Which of K clients are compared by chance: at most STRANGERS, evenly spaced."""
    return slice(None, None, -(-K // STRANGERS))


def _is_wide(B: Tensor, A: Tensor) -> bool:
    """Whether the products themselves are no larger than their factors."""
    out, r, width = B.shape[-2], B.shape[-1], A.shape[-1]
    return out * width <= r * (out + width)


def inner_products(B: Tensor, A: Tensor, gram: Tensor | None) -> Tensor:
    """(K, K) of W_j and W_k: exact up to a stacked rank of GRAM_LIMIT, else through S W_k T, S and T Gaussian
    (error of a cosine about 1 / SKETCH per module). gram: of B's columns, if it is known."""
    K, out, r = B.shape[-3:]
    if _is_wide(B, A):
        W = (B @ A).flatten(-2)
        return W @ W.mT
    if K * r <= GRAM_LIMIT:
        gram = gram_of(flat(B)) if gram is None else gram
        return _of_clients(gram * gram_of(A.flatten(-3, -2).mT), K)
    left = drawn_like(B, (SKETCH, out), 1) / SKETCH**0.5
    right = drawn_like(A, (A.shape[-1], SKETCH), 2) / SKETCH**0.5
    seen = ((left @ B[..., k, :, :]) @ (A[..., k, :, :] @ right) for k in range(K))
    small = torch.stack(list(seen), dim=-3).flatten(-2)
    return small @ small.mT


def _blocks(B: Tensor, R: Tensor, grams: Grams | None, keep: bool) -> Blocks:
    """Of X_k = B_k R_k. grams: if they are known: then X itself is not formed, and where they are kept no basis."""
    K, out, r = B.shape[-3:]
    width = WIDTH if K <= MANY else WIDTH_MANY
    if grams is not None and r <= out and width < min(out, K * r):
        energy = (grams.own("B", K) * (R @ R.mT)).sum((-2, -1)).double().clamp_min(0)
        R = R * _inverse_root(energy).to(R)[..., None, None]
        inward, coords = _gram_basis(grams.B, R, width)
        return Blocks(None if keep else flat(B) @ inward, coords, energy, out, *((inward, grams) if keep else ()))
    X = B @ R
    if r > out:
        X = roots(X)
    energy = X.square().sum(-2).double().sum(-1)
    X = X * _inverse_root(energy).to(X)[..., None, None]
    if out <= width:
        return Blocks(None, X, energy, out)
    basis = orthonormal(flat(X)) if K * r <= width else _range_basis(flat(X), width)
    return Blocks(basis, (basis.mT if X.dim() == 3 else basis.mT.unsqueeze(-3)) @ X, energy, out)


def _inverse_root(energy: Tensor) -> Tensor:
    """1 / sqrt(energy), 0 for none."""
    return torch.where(energy > 0, energy.clamp_min(1e-300).rsqrt(), torch.zeros_like(energy))


def _gram_basis(gram: Tensor, R: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(Z, U^T X_k) from the Gram of B (out, n): the leading left singular vectors of X = [B_1 R_1 ... B_K R_K] are
    U = X V / s = B Z, and U^T X = V^T (X^T X) / s; orthonormal but for rounding in the weakest directions."""
    *lead, K, r, _ = R.shape
    n = K * r
    half = (R.mT @ gram.reshape(*lead, K, r, n)).reshape(*lead, n, K, r).movedim(-3, -2)
    H = (half @ R).movedim(-3, -2).reshape(*lead, n, n)
    H = (H + H.mT) / 2
    values, vectors = _leading_pairs(H, width)
    sound = values > 1e-5 * values[..., -1:].clamp_min(1e-30)
    if not lead:  # of several modules, what is not sound stays, as columns of zeros
        values, vectors, sound = values[sound], vectors[:, sound], sound[sound]
    inward = vectors * torch.where(sound, values, torch.inf).rsqrt()[..., None, :]
    coords = (inward.mT @ H).reshape(*lead, -1, K, r).movedim(-3, -2).contiguous()
    return (R @ inward.reshape(*lead, K, r, -1)).flatten(-3, -2), coords


def _leading_pairs(H: Tensor, count: int, spare: int = 16, passes: int = 3) -> tuple[Tensor, Tensor]:
    """The `count` largest eigenvalues of H (n, n), positive semi-definite, in ascending order, and eigenvectors: exact
    for small H, else by subspace iteration, which leaves the smallest of them less exact than the largest."""
    if H.shape[-1] <= 2 * count:
        values, vectors = eigh(H)
    else:
        Q = drawn_like(H, (H.shape[-1], count + spare), 3)
        for _ in range(passes):
            Q = orthonormal(H @ Q)
        values, turn = eigh(Q.mT @ H @ Q)
        vectors = Q @ turn
    return values[..., -count:], vectors[..., -count:]


def _range_basis(X: Tensor, width: int, passes: int = 2) -> Tensor:
    """The same by randomised subspace iteration: time linear in the number of clients."""
    Q = drawn_like(X, (X.shape[-2], width), 3)
    for _ in range(passes):
        Q = orthonormal(X @ (X.mT @ Q))
    return Q


def affinity(coords: Tensor) -> Tensor:
    """(K, K) overlap of subspaces: <X_j X_j^T, X_k X_k^T> of unit-energy blocks; 1 / out on average by chance."""
    scatter = (coords @ coords.transpose(1, 2)).reshape(len(coords), -1)
    return scatter @ scatter.T
