"""The leading part of a product from the Gram matrices of its two factors: no QR of either, no (out, in) matrix.

M = B A with B (out, n) and A (n, in), n columns of many clients side by side. With B^T B = L L^T, the squared singular
values of M are the eigenvalues of H = L^T (A A^T) L, which is only (n, n). Forming a Gram matrix squares the condition,
so what could lose more than LOST of M is refused, and the caller goes by QR.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fedlora_hf.numerics.small import eigh

# Columns of a Gram matrix that are computed at once.
STRIP = 128
# Relative to M, the most that rounding of the Gram matrices may cost [our choice].
LOST = 1e-6
# What is added to a Gram matrix without a Cholesky factor, as shares of its trace, in turn.
SHIFTS = (0.0, 1e-15, 1e-14)
# Directions iterated on beyond those wanted, and corrections made before all of H is decomposed in float64.
SPARE, CORRECTIONS = 8, 8
# Residual of an eigenpair, relative to the largest singular value times its own, at which it counts as found.
TOLERANCE = 1e-8
# An eigenvalue below this share of the largest is a singular value below LOST: rounding, as far as M goes.
NOTHING = LOST**2


class Leading(NamedTuple):
    """U (out, q), S (q,) and Vh (q, in) of the leading part of M; total = ||M||^2, exact to rounding. float64."""

    U: Tensor
    S: Tensor
    Vh: Tensor
    total: float


def gram_of(X: Tensor) -> Tensor:
    """X^T X (..., n, n) of X (..., out, n), in strips of columns: what lies below a strip's diagonal block is copied
    from beside it, so that the work is little more than half that of the product."""
    n = X.shape[-1]
    gram = X.new_empty(*X.shape[:-2], n, n)
    for first in range(0, n, STRIP):
        last = first + STRIP
        gram[..., first:last, first:] = X[..., first:last].mT @ X[..., first:]
        gram[..., last:, first:last] = gram[..., first:last, last:].mT
    return gram


def leading_part(B: Tensor, A: Tensor, rank: int) -> Leading | None:
    """The best approximation of B A of at most `rank` from B (out, n) and A (n, in), float64; within LOST of it.

    None where the Gram matrices cannot tell it to that: M is small next to its factors (they cancel), or zero.
    """
    left, right = gram_of(B), gram_of(A.T)
    L, shift = _cholesky(left)
    if L is None:
        return None
    total = float((left * right).sum())
    if not total > 0:
        return None
    unit = float(right.trace())  # float32 has no room for squares of squares
    rough = _sandwiched((L / float(left.trace()) ** 0.5).float(), (right / unit).float())
    found = leading_eigenpairs(lambda X: L.T @ (right @ (L @ X)), rough, float(left.trace()) * unit, rank)
    rounding = max(shift, torch.finfo(B.dtype).eps) * float(left.trace()) * float(torch.linalg.matrix_norm(right))
    if found is None or not rounding < NOTHING * float(found[0][-1]):
        return None
    values, vectors = found
    kept = values > NOTHING * values[-1]
    back = right @ (L @ vectors[:, kept]) / values[kept]  # B back = U: one more power, so nothing is divided by L
    U, R = torch.linalg.qr(B @ back)
    inner = torch.linalg.solve_triangular(R, left @ back, upper=True, left=False)  # B^T U without a pass over B
    V, S, turn = torch.linalg.svd(A.T @ inner, full_matrices=False)
    return Leading(U @ turn[:rank].T, S[:rank], V[:, :rank].T, total)


def _cholesky(gram: Tensor) -> tuple[Tensor | None, float]:
    """(L, the shift it took as a share of the trace), or (None, 0) where no shift does."""
    for shift in SHIFTS:
        shifted = gram if not shift else gram + torch.diag(gram.trace().mul(shift).expand(len(gram)))
        L, failed = torch.linalg.cholesky_ex(shifted)
        if not int(failed):
            return L, shift
    return None, 0.0


def _sandwiched(L: Tensor, G: Tensor) -> Tensor:
    """L^T G L of a lower triangle L (n, n) and a symmetric G, leaving out what is zero or the mirror of something."""
    half, H = torch.empty_like(G), torch.empty_like(G)
    for first in range(0, len(L), STRIP):
        half[:, first : first + STRIP] = G[:, first:] @ L[first:, first : first + STRIP]
    for first in range(0, len(L), STRIP):
        last = first + STRIP
        H[first:last, first:] = L[first:, first:last].T @ half[first:, first:]
        H[last:, first:last] = H[first:last, last:].T
    return H


def leading_eigenpairs(
    apply: Callable[[Tensor], Tensor], rough: Tensor, unit: float, count: int
) -> tuple[Tensor, Tensor] | None:
    """(eigenvalues in ascending order, eigenvectors (n, q)) of the `count` largest of a positive semi-definite H, and
    of a few more that are less exact; None where no start can be had.

    apply: X (n, q) -> H X in float64. rough: H / unit (n, n) in float32, whose eigenvectors are where to start from,
    and what an eigenpair's residual is divided by to correct it (Davidson 1975, with H in place of its diagonal).
    """
    if not bool(torch.isfinite(rough).all()):
        return None
    values, vectors = torch.linalg.eigh(rough)
    values, vectors = values.double() * unit, vectors.double()
    X = vectors[:, -(count + SPARE) :]
    for _ in range(CORRECTIONS):
        X = torch.linalg.qr(X)[0]
        image = apply(X)
        own, turn = eigh(X.T @ image)
        own, turn = own[-(count + SPARE) :], turn[:, -(count + SPARE) :]
        X, residual = X @ turn, image @ turn
        residual = residual - X * own
        sizes, floor = torch.linalg.vector_norm(residual, dim=0)[-count:], own.clamp_min(0)
        top, wanted = floor[-1], floor[-count:]
        left = (sizes > TOLERANCE * (top * wanted).sqrt()) & (wanted > NOTHING * top)
        if not bool(left.any()):
            return own, X
        gap = values[:, None] - own
        gap = torch.where(gap.abs() < 1e-9 * top, -1e-9 * top, gap)
        step = vectors @ ((vectors.T @ residual) / gap)
        step = step - X @ (X.T @ step)
        X = torch.cat([X, step / torch.linalg.vector_norm(step, dim=0).clamp_min(1e-300)], dim=1)
    H = apply(torch.eye(len(rough), dtype=torch.float64, device=rough.device))
    own, X = torch.linalg.eigh((H + H.T) / 2)
    return own[-count:], X[:, -count:]
