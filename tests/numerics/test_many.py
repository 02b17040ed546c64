"""Several modules' products cut at once: the best approximations of each, or an honest handing on to one at a time."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedlora_hf.numerics import lowrank, many

Pair = tuple[Tensor, Tensor]
MODULES, RANK = 3, 6


def factors(out: int, n: int, width: int) -> Pair:
    g = torch.Generator().manual_seed(out + n)
    return torch.randn(MODULES, out, n, generator=g).double(), torch.randn(MODULES, n, width, generator=g).double()


def flat() -> Pair:
    return factors(420, 360, 380)


def falling() -> Pair:
    """Over five powers of ten, as the mean of trained factors."""
    B, A = factors(420, 360, 380)
    return B * torch.logspace(0, -5, 360, dtype=torch.float64), A


def few_and_many() -> Pair:
    """Four large directions on a flat ground of a thousandth: the largest are found long before the rest."""
    B, A = factors(420, 360, 380)
    B[:, :, :4] *= 1e3
    return B, A


def narrow() -> Pair:
    """So few columns that all of them are decomposed."""
    return factors(300, 40, 200)


def wide() -> Pair:
    """More columns than a side of the product."""
    return factors(90, 400, 120)


def tall() -> Pair:
    return factors(120, 400, 90)


def padded() -> Pair:
    """Every sixth client with half the rank of the others."""
    B, A = factors(420, 360, 380)
    B, A = B.clone(), A.clone()
    for first in range(0, 360, 36):
        B[:, :, first : first + 3], A[:, first : first + 3] = 0, 0
    return B, A


def not_begun() -> Pair:
    """A client whose B is zero still, with an A that is not."""
    B, A = factors(420, 360, 380)
    B[:, :, 30:36] = 0
    return B, A


def copies() -> Pair:
    """Of one client's columns, many times."""
    B, A = factors(420, 360, 380)
    B[:, :, 200:], A[:, 200:] = B[:, :, :160].clone(), A[:, :160].clone()
    return B, A


@pytest.mark.parametrize("cohort", [flat, falling, few_and_many, narrow, wide, tall, padded, not_begun, copies])
def test_each_is_the_best_approximation(cohort: Callable[[], Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    B, A = cohort()
    monkeypatch.setattr(many, "_one", lambda *_: pytest.fail("left to one at a time"))
    for m, low in enumerate(many.means_truncated(B, A, RANK)):
        W = B[m] @ A[m]
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        best = U[:, :RANK] * S[:RANK] @ Vh[:RANK]
        assert float((low.B @ low.A - best).norm() / best.norm()) < 1e-6
        torch.testing.assert_close(low.spectrum[:RANK], S[:RANK])
        rest = float(S[RANK:].square().sum() / S.square().sum())
        assert low.discarded == pytest.approx(rest, abs=1e-9)
        largest = low.B.gather(0, low.B.abs().argmax(0, keepdim=True))
        assert bool((largest > 0).all())


def test_a_module_that_gram_matrices_cannot_tell_is_worked_on_alone_and_the_others_are_not() -> None:
    B, A = flat()
    B[1, :, 180:], A[1, 180:] = -B[1, :, :180], A[1, :180] * (1 + 1e-9)  # they cancel but for rounding
    B[2] = 0
    assert [low is None for low in many._by_grams(B, A, RANK)] == [False, True, True]
    for m, low in enumerate(many.means_truncated(B, A, RANK)):
        alone = lowrank.truncate(B[m], A[m], RANK)
        torch.testing.assert_close(low.B @ low.A, alone.B @ alone.A, atol=1e-6 * float(alone.B.norm()) ** 2, rtol=1e-6)


def test_what_is_not_finite_ends_nobody_elses_search() -> None:
    H = factors(300, 300, 300)[0]
    H = H @ H.mT
    H[1, 0, 0] = torch.nan
    values, vectors, found = many.leading_eigenpairs(H, 5)
    assert found.tolist() == [True, False, True]
    for m in (0, 2):
        torch.testing.assert_close(values[m, -5:], torch.linalg.eigvalsh(H[m])[-5:])
        torch.testing.assert_close(H[m] @ vectors[m, :, -5:], vectors[m, :, -5:] * values[m, -5:], rtol=1e-6, atol=1e-3)


def test_more_directions_than_columns_are_found_too() -> None:
    H = factors(600, 600, 600)[0]
    H = H @ H.mT
    values, _, found = many.leading_eigenpairs(H, many.COLUMNS + 3)
    assert bool(found.all())
    torch.testing.assert_close(values[0, -many.COLUMNS - 3 :], torch.linalg.eigvalsh(H[0])[-many.COLUMNS - 3 :])
