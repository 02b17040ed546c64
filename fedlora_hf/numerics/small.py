"""Small dense problems on any device: a GPU decomposes matrices one after the other where a CPU takes several at once.

Without leading dimensions these are LAPACK's. With them, on another device than the CPU, symmetric matrices of up to
BATCHED rows are decomposed there all at once (cuSOLVER's batched Jacobi), larger ones on the CPU on several threads:
200 rows take a GPU about 1.5 ms each, one after the other.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable

import torch
from torch import Tensor

from fedlora_hf.util.side_by_side import side_by_side

# Rows up to which a symmetric matrix is decomposed on the CPU wherever it lies [our choice], and up to which many are
# decomposed at once where they lie.
ON_CPU, BATCHED = 256, 32
# What a Gram matrix of columns of length 1 gains on its diagonal, per column, so that it has a Cholesky factor: far
# above its rounding, far below what float32 factors hold.
SHIFT = 1e-13
THREADS = 32


def eigh(H: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh` of H (..., n, n), its result where H is."""
    if H.device.type == "cpu" or H.shape[-1] > ON_CPU or (H.dim() > 2 and H.shape[-1] <= BATCHED):
        values, vectors = torch.linalg.eigh(H)
        return values, vectors
    values, vectors = _on_cpu(torch.linalg.eigh, H)
    return values, vectors


def svd(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.linalg.svd` of X (..., n, q) without what it does not need, its result where X is."""
    if X.device.type == "cpu" or X.dim() == 2 or max(X.shape[-2:]) <= BATCHED:
        U, S, Vh = torch.linalg.svd(X, full_matrices=False)
        return U, S, Vh
    U, S, Vh = _on_cpu(lambda part: torch.linalg.svd(part, full_matrices=False), X)
    return U, S, Vh


def _on_cpu(work: Callable[[Tensor], tuple[Tensor, ...]], X: Tensor) -> list[Tensor]:
    """A decomposition on the CPU, its parts brought back; several matrices on several threads."""
    if X.dim() == 2:
        return [part.to(X.device) for part in work(X.cpu())]
    lead = X.shape[:-2]
    here = X.cpu().flatten(0, -3)
    pieces = here.split(max(1, -(-len(here) // THREADS)))
    found = list(side_by_side(work, pieces, True, THREADS))
    return [torch.cat(parts).unflatten(0, lead).to(X.device) for parts in zip(*found, strict=True)]


def orthonormal(X: Tensor) -> Tensor:
    """Columns of length 1, orthogonal to each other, of the span of X (..., n, q), n >= q.

    One matrix by Householder's QR; several by `cholesky_qr`, in float64, which is a few products for all of them.
    """
    return torch.linalg.qr(X)[0] if X.dim() == 2 else cholesky_qr(X)[0].to(X.dtype)


def cholesky_qr(X: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, T), float64, with Q = X T and Q^T Q = 1 from X (..., n, q): Cholesky QR with shifts (Fukaya et al. 2020,
    arXiv 1809.11085), columns scaled to length 1 first, three times. Columns that the others span come out near 0.
    """
    X = X.double()
    length = torch.linalg.vector_norm(X, dim=-2, keepdim=True).clamp_min(1e-300)
    Q, T = X / length, torch.diag_embed(1 / length[..., 0, :])
    one = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    for _ in range(3):
        upper = torch.linalg.cholesky_ex(Q.mT @ Q + SHIFT * X.shape[-1] * one)[0].mT
        Q, T = (torch.linalg.solve_triangular(upper, part, upper=True, left=False) for part in (Q, T))
    return Q, T
