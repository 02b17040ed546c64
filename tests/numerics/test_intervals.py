"""Bootstrap intervals: they cover the truth about as often as they say, repeat themselves, and draw whole groups."""
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from fedlora_hf.numerics.intervals import bootstrap


def test_a_95_percent_interval_covers_about_95_percent() -> None:
    generator = torch.Generator().manual_seed(1)
    hits = 0
    for trial in range(200):
        low, high = bootstrap(torch.randn(60, generator=generator).tolist(), seed=trial)
        hits += low <= 0.0 <= high
    assert 0.9 <= hits / 200 <= 0.98


def test_its_width_is_that_of_the_normal_approximation() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    low, high = bootstrap(values, seed=0)
    assert high - low == pytest.approx(2 * 1.96 * torch.tensor(values).std().item() / 20, rel=0.1)
    assert bootstrap(values, seed=0) == (low, high) != bootstrap(values, seed=1)


def test_groups_are_drawn_whole_and_weights_count() -> None:
    apart = [0.0, 1.0] * 50
    together = bootstrap(apart, seed=0, groups=[0, 1] * 50)
    alone = bootstrap(apart, seed=0)
    assert together == (0.0, 1.0)
    assert 0.3 < alone[0] < alone[1] < 0.7
    assert bootstrap([1.0, 5.0], seed=0, weights=[1.0, 0.0], groups=[7, 7]) == (1.0, 1.0)


def test_without_values_there_is_no_interval() -> None:
    assert all(math.isnan(end) for end in bootstrap([], seed=0))
    assert bootstrap([2.0], seed=0) == (2.0, 2.0)
