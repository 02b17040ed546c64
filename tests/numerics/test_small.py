"""Small problems: the same of several matrices at once as of each; orthonormal columns, some of no use among them."""
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from torch import Tensor

from fedlora_hf.numerics import small
from tests.other_device import PLACE, Elsewhere, OtherDevice


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n", [small.BATCHED, small.BATCHED + 1, small.ON_CPU + 1])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_eigenpairs_and_singular_triplets_come_back_to_where_the_matrix_is(n: int, lead: tuple[int, ...]) -> None:
    X = drawn(*lead, n, n)
    H = X @ X.mT
    with OtherDevice():
        found = (*small.eigh(H.to(PLACE)), *small.svd(X.to(PLACE)))
        assert all(isinstance(part, Elsewhere) for part in found)
        values, vectors, U, S, Vh = (part.cpu() for part in found)
    torch.testing.assert_close(vectors * values[..., None, :] @ vectors.mT, H)
    torch.testing.assert_close(U * S[..., None, :] @ Vh, X)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(H))


def test_several_matrices_on_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "THREADS", 2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    X = drawn(5, 40, 40)
    try:
        values, vectors = small._on_cpu(torch.linalg.eigh, X @ X.mT)
    finally:
        torch.set_num_threads(before)
    for one, own, turn in zip(X, values, vectors, strict=True):
        torch.testing.assert_close(turn * own @ turn.mT, one @ one.mT)


@pytest.mark.parametrize("lead", [(), (4,)])
def test_orthonormal_columns_of_the_same_span(lead: tuple[int, ...]) -> None:
    X = drawn(*lead, 60, 12).float() * torch.logspace(0, -4, 12)
    Q = small.orthonormal(X)
    assert Q.dtype == X.dtype
    torch.testing.assert_close(Q.mT @ Q, torch.eye(12).expand(*lead, 12, 12), atol=1e-5, rtol=0)
    torch.testing.assert_close(Q @ (Q.mT @ X), X, atol=1e-5, rtol=0)


def test_cholesky_qr_tells_what_it_multiplied_by() -> None:
    X = drawn(3, 50, 8) * torch.logspace(0, -7, 8, dtype=torch.float64)
    Q, T = small.cholesky_qr(X)
    torch.testing.assert_close(X @ T, Q, atol=1e-6, rtol=0)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(8).double().expand(3, 8, 8), atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", ["zero", "twice"])
def test_columns_that_say_nothing_new_are_finite_and_disturb_no_other(kind: str) -> None:
    X = drawn(2, 40, 6)
    X[:, :, 4] = 0 if kind == "zero" else X[:, :, 1]
    Q = small.orthonormal(X)
    assert bool(torch.isfinite(Q).all())
    kept = Q[:, :, :4]
    torch.testing.assert_close(kept.mT @ kept, torch.eye(4).double().expand(2, 4, 4), atol=1e-9, rtol=0)
    torch.testing.assert_close(Q @ (Q.mT @ X), X, atol=1e-5, rtol=0)
