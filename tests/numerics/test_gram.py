"""The leading part by Gram matrices against QR, and when it says that it cannot tell."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedlora_hf.numerics import gram, lowrank

OUT, WIDTH, CLIENTS, RANK = 900, 800, 40, 8
Cohort = list[tuple[Tensor, Tensor]]


@pytest.mark.parametrize("n", [1, gram.STRIP, 2 * gram.STRIP + 5])
def test_a_gram_matrix_by_strips(n: int) -> None:
    X = torch.randn(40, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    torch.testing.assert_close(gram.gram_of(X), X.T @ X)


def trained() -> Cohort:
    """As LoRA leaves them: one start of every A, a common part, a spectrum that falls by three orders of magnitude."""
    g = torch.Generator().manual_seed(1)
    fall, start, common = (
        torch.logspace(0, -3, RANK),
        torch.randn(RANK, WIDTH, generator=g),
        torch.randn(OUT, RANK, generator=g),
    )
    return [
        (
            (common + 0.3 * torch.randn(OUT, RANK, generator=g)) * fall,
            start + 0.1 * torch.randn(RANK, WIDTH, generator=g),
        )
        for _ in range(CLIENTS)
    ]


def unrelated() -> Cohort:
    """A flat spectrum."""
    g = torch.Generator().manual_seed(2)
    return [(torch.randn(OUT, RANK, generator=g), torch.randn(RANK, WIDTH, generator=g)) for _ in range(CLIENTS)]


def one_client_many_times() -> Cohort:
    return trained()[:1] * CLIENTS


def most_of_them_nothing() -> Cohort:
    return [(B * (k > 30), A) for k, (B, A) in enumerate(trained())]


def tiny() -> Cohort:
    return [(B * 1e-12, A * 1e-9) for B, A in trained()]


def in_bfloat16() -> Cohort:
    return [(B.bfloat16(), A.bfloat16()) for B, A in trained()]


COHORTS: list[Callable[[], Cohort]] = [
    trained,
    unrelated,
    one_client_many_times,
    most_of_them_nothing,
    tiny,
    in_bfloat16,
]


@pytest.mark.parametrize("cohort", COHORTS)
def test_the_mean_by_gram_matrices_is_that_by_qr(cohort: Callable[[], Cohort], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "FULL_SVD", 256)
    pairs, weights = cohort(), torch.softmax(torch.arange(CLIENTS) / CLIENTS, 0).double().tolist()
    found = gram.leading_part(*lowrank.concatenated(pairs, weights), RANK)
    assert found is not None  # this is the route that is compared
    low, exact = (
        lowrank.mean_truncated(pairs, weights, RANK),
        lowrank.truncate(*lowrank.concatenated(pairs, weights), RANK),
    )
    W = exact.B @ exact.A
    assert float((low.B @ low.A - W).norm() / W.norm()) < 1e-6
    sizes = exact.spectrum[: len(low.spectrum)]
    torch.testing.assert_close(low.spectrum, sizes, rtol=1e-9, atol=1e-9 * float(sizes[0]))
    assert low.discarded == pytest.approx(exact.discarded, rel=1e-9, abs=1e-12)
    again = lowrank.mean_truncated(pairs, weights, RANK)
    assert torch.equal(low.B, again.B)
    assert torch.equal(low.A, again.A)


def test_what_cancels_goes_by_qr(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two large updates whose difference is the mean: the squares of what is left are lost in those of what is not."""
    monkeypatch.setattr(lowrank, "FULL_SVD", 256)
    B, A = trained()[0]
    small = torch.randn(RANK, WIDTH, generator=torch.Generator().manual_seed(5))
    pairs = [(B, A), (B, A + 1e-5 * small)] + [(B, A)] * (CLIENTS - 2)
    weights = [1.0, -1.0, *[0.0] * (CLIENTS - 2)]
    stacked = lowrank.concatenated(pairs, weights)
    assert gram.leading_part(*stacked, RANK) is None
    low, exact = lowrank.mean_truncated(pairs, weights, RANK), lowrank.truncate(*stacked, RANK)
    assert torch.equal(low.B, exact.B)
    zero = lowrank.mean_truncated([(0 * B, A)] * CLIENTS, [1 / CLIENTS] * CLIENTS, RANK)
    assert float(zero.B.norm()) == 0
    assert zero.discarded == 0


def test_a_start_that_is_of_no_use_is_made_good_by_a_full_decomposition() -> None:
    g = torch.Generator().manual_seed(3)
    X = torch.randn(300, 300, generator=g, dtype=torch.float64)
    H = X @ X.T
    misleading = torch.diag(torch.rand(300, generator=g))
    found = gram.leading_eigenpairs(lambda Y: H @ Y, misleading, float(H.trace()), 5)
    assert found is not None
    values, vectors = found
    torch.testing.assert_close(values[-5:], torch.linalg.eigvalsh(H)[-5:])
    torch.testing.assert_close(H @ vectors[:, -5:], vectors[:, -5:] * values[-5:])
    assert gram.leading_eigenpairs(lambda Y: H @ Y, misleading / 0, 1.0, 5) is None
