"""Splitting a matrix into magnitude and direction, and averaging the two apart."""
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_hf.numerics.direction import (
    Components,
    canonical,
    fold,
    mean_components,
    mean_matrix,
    normalised,
    seeded_directions,
    split,
)

AXES = ("row", "column")


def matrix(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("axis", AXES)
@given(n=st.integers(1, 6), k=st.integers(1, 6), seed=st.integers(0, 99), exponent=st.sampled_from([-30, -8, 0, 8, 30]))
@settings(max_examples=25, deadline=None)
def test_split_is_canonical_and_folds_back(axis, n, k, seed, exponent):
    weight = matrix(n, k, seed) * 10.0**exponent
    magnitude, direction = split(weight, axis)
    assert magnitude.shape == ((n, 1) if axis == "row" else (1, k))
    assert (magnitude > 0).all()
    lengths = direction.norm(dim=1 if axis == "row" else 0)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=1e-6, atol=0)
    torch.testing.assert_close(fold(magnitude, direction, axis), weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("axis", AXES)
def test_zero_vectors_take_the_fallback_and_keep_magnitude_zero(axis):
    weight = matrix(4, 4)
    weight[1], weight[:, 2] = 0, 0
    zero = (slice(1, 2), slice(None)) if axis == "row" else (slice(None), slice(2, 3))
    fallback = 7 * matrix(4, 4, 1)
    magnitude, direction = split(weight, axis, fallback)
    assert magnitude[1 if axis == "row" else 0, 0 if axis == "row" else 2] == 0
    torch.testing.assert_close(direction[zero], normalised(fallback, axis)[zero])
    torch.testing.assert_close(fold(magnitude, direction, axis), weight)
    assert (split(weight, axis).direction[zero] == 0).all()


@pytest.mark.parametrize("axis", AXES)
def test_canonical_form_is_the_same_matrix_and_a_fixed_point(axis):
    loose = Components(matrix(5, 1, 1) if axis == "row" else matrix(1, 3, 1), 3 * matrix(5, 3, 2))
    tight = canonical(loose, axis)
    assert (tight.magnitude >= 0).all()
    torch.testing.assert_close(fold(*tight, axis), fold(*loose, axis))
    for once, twice in zip(tight, canonical(tight, axis), strict=True):
        torch.testing.assert_close(once, twice)


@pytest.mark.parametrize("axis", AXES)
def test_gradients_are_the_analytic_ones(axis):
    dim = 1 if axis == "row" else 0
    magnitude = torch.randn(*((4, 1) if axis == "row" else (1, 3)), dtype=torch.float64, requires_grad=True)
    direction = (2 * matrix(4, 3).double()).requires_grad_()
    upstream = matrix(4, 3, 5).double()
    fold(magnitude, direction, axis).backward(upstream)
    length = direction.norm(dim=dim, keepdim=True)
    unit = (direction / length).detach()
    along = (upstream * unit).sum(dim, keepdim=True)
    torch.testing.assert_close(magnitude.grad, along)
    torch.testing.assert_close(direction.grad, (magnitude / length * (upstream - along * unit)).detach())
    assert torch.autograd.gradcheck(lambda m, d: fold(m, d, axis), (magnitude, direction))


def test_seeded_directions_do_not_touch_the_global_generator():
    state = torch.get_rng_state()
    first, second = seeded_directions((6, 3), "row", 11), seeded_directions((6, 3), "row", 11)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, second)
    assert not torch.equal(first, seeded_directions((6, 3), "row", 12))
    torch.testing.assert_close(first.norm(dim=1), torch.ones(6))


@pytest.mark.parametrize("axis", AXES)
def test_mean_of_one_and_of_equal_matrices_is_the_matrix(axis):
    weight = matrix(5, 4)
    weight[2] = 0
    torch.testing.assert_close(mean_matrix([weight], [3.0], axis), weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(mean_matrix([weight] * 3, [1, 5, 2], axis), weight, rtol=1e-6, atol=1e-7)


def test_mean_averages_magnitudes_and_directions_apart():
    first, second = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    torch.testing.assert_close(mean_matrix([first, second], [1, 1], "row"), torch.full((1, 2), 2 / 2**0.5))
    # Weights 3 to 1: magnitude 2.5, direction along (3, 1).
    expected = 2.5 * normalised(torch.tensor([[3.0, 1.0]]), "row")
    torch.testing.assert_close(mean_matrix([first, second], [0.75, 0.25], "row"), expected)


def test_a_zero_vector_counts_in_the_magnitude_only_and_opposites_cancel():
    vector, zero = torch.tensor([[4.0, 0.0]]), torch.zeros(1, 2)
    torch.testing.assert_close(mean_matrix([vector, zero], [1, 1], "row"), vector / 2)
    tilted = matrix(1, 7)
    assert (mean_matrix([tilted, -tilted], [1, 1], "row") == 0).all()


def test_mean_components_takes_each_factor_on_its_own_axis():
    pairs = [(matrix(2, 5, seed), matrix(6, 2, seed + 10)) for seed in range(3)]
    A, B = mean_components(pairs, [1, 2, 1], axis_a="column", axis_b="row")
    torch.testing.assert_close(A, mean_matrix([A for A, _ in pairs], [1, 2, 1], "column"))
    torch.testing.assert_close(B, mean_matrix([B for _, B in pairs], [1, 2, 1], "row"))
    assert not torch.allclose(A, mean_components(pairs, [1, 2, 1])[0])
