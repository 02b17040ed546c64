"""Robust means against their definitions."""
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_hf.numerics import means


def points(seed: int, count: int, size: int = 6) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("values", "expected"), [([3.0], 3.0), ([1.0, 9.0], 5.0), ([1.0, 2.0, 9.0], 2.0)])
def test_median_of_few(values: list[float], expected: float) -> None:
    assert float(means.median(torch.tensor(values))) == expected


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 9))
def test_median_is_the_half_quantile(seed: int, count: int) -> None:
    values = points(seed, count)
    assert torch.allclose(means.median(values), values.quantile(0.5, dim=0))


def test_trimming_drops_that_many_at_each_end() -> None:
    values = torch.tensor([[1e9], [1.0], [2.0], [3.0], [-1e9]], dtype=torch.float64)
    assert float(means.trimmed_mean(values, 1)) == 2.0
    assert float(means.trimmed_mean(values, 0)) == pytest.approx(1.2)


def test_distances_come_from_the_gram() -> None:
    values = points(1, 5)
    distances = means.squared_distances(values @ values.T)
    assert torch.allclose(distances, torch.cdist(values, values).square(), atol=1e-10)
    assert not distances.diagonal().any()


def test_normalised_gram_keeps_zero_rows_zero() -> None:
    values = points(1, 4)
    values[2] = 0
    gram = means.normalised(values @ values.T)
    assert torch.allclose(gram.diagonal(), torch.tensor([1.0, 1, 0, 1], dtype=torch.float64))
    assert not gram[2].any()


def test_krum_scores_by_definition() -> None:
    values, contaminated = points(2, 7), 2
    distances = torch.cdist(values, values).square()
    expected = [
        sum(sorted(float(d) for j, d in enumerate(row) if j != k)[: 7 - 2 - 2]) for k, row in enumerate(distances)
    ]
    scores = means.krum_scores(means.squared_distances(values @ values.T), contaminated)
    assert scores.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_krum_scores_of_very_few(count: int) -> None:
    scores = means.krum_scores(means.squared_distances(torch.eye(count, dtype=torch.float64)), 0)
    assert scores.tolist() == [0.0 if count == 1 else 2.0] * count


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(2, 9))
def test_geometric_median_minimises_the_sum_of_distances(seed: int, count: int) -> None:
    values, shares = points(seed, count), torch.arange(1.0, count + 1, dtype=torch.float64)
    found = means.geometric_median(values @ values.T, shares, 1e-9, 5000)
    assert float(found.weights.sum()) == pytest.approx(1)
    where = found.weights @ values

    def cost(point: torch.Tensor) -> float:
        return float((shares * (values - point).norm(dim=1)).sum())

    best = cost(where)
    for step in points(seed + 1, 20) * 0.05:
        assert cost(where + step) >= best - 1e-6 * best


def test_geometric_median_of_one_point_repeated() -> None:
    gram = torch.ones(4, 4, dtype=torch.float64)
    found = means.geometric_median(gram, torch.ones(4, dtype=torch.float64), 1e-9, 10)
    assert found.converged
    assert found.weights.tolist() == pytest.approx([0.25] * 4)


def test_geometric_median_ignores_the_unit_of_measure() -> None:
    values, shares = points(5, 6), torch.ones(6, dtype=torch.float64)
    one = means.geometric_median(values @ values.T, shares, 1e-9, 1000).weights
    two = means.geometric_median(values @ values.T * 1e-16, shares, 1e-9, 1000).weights
    assert torch.allclose(one, two, atol=1e-8)


def test_geometric_median_says_when_it_was_stopped() -> None:
    values = points(5, 6)
    found = means.geometric_median(values @ values.T, torch.ones(6, dtype=torch.float64), 1e-12, 2)
    assert (found.n_iter, found.converged) == (2, False)
