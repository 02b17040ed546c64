"""Means made to withstand contaminated clients: their options and what they say of themselves."""
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass

from fedlora_hf.errors import ConfigError
from fedlora_hf.methods.method import Method


@dataclass(frozen=True)
class TrimmedMeanOptions:
    """trim: share of the clients dropped at each end of every coordinate (rounded down to whole clients)."""

    trim: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.trim < 0.5:
            raise ConfigError(f"trim={self.trim}: must be at least 0 and below 0.5; choose 0.25 for instance")


@dataclass(frozen=True)
class MultiKrumOptions:
    """num_contaminated: f, how many clients may be contaminated; default the most theory allows, floor((K - 3) / 2).
    num_selected: how many clients are averaged; default K - f. normalise: compare directions only, every update at
    unit norm; a boosted client then passes with its size, so leave it off where clients may boost.
    """

    num_contaminated: int | None = None
    num_selected: int | None = None
    normalise: bool = False

    def __post_init__(self) -> None:
        if self.num_contaminated is not None and self.num_contaminated < 0:
            raise ConfigError(f"num_contaminated={self.num_contaminated}: must be at least 0; leave it out for most")
        if self.num_selected is not None and self.num_selected < 1:
            raise ConfigError(f"num_selected={self.num_selected}: must be at least 1; leave it out for K - f")


@dataclass(frozen=True)
class GeometricMedianOptions:
    """tolerance: change of the weights (sum of absolute values) that ends the iteration; max_iterations: its limit."""

    tolerance: float = 1e-8
    max_iterations: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:
            raise ConfigError(f"tolerance={self.tolerance}: must be above 0 and below 1; choose 1e-8 for instance")
        if self.max_iterations < 1:
            raise ConfigError(f"max_iterations={self.max_iterations}: must be at least 1; choose 1000 for instance")


METHODS = (
    Method(
        name="median",
        title="Coordinate-wise median of the products",
        paper="Yin et al. 2018 (arXiv 1803.01498), on products",
        averages="product",
        robust=True,
        weighted=False,
    ),
    Method(
        name="trimmed_mean",
        title="Coordinate-wise trimmed mean of the products",
        paper="Yin et al. 2018 (arXiv 1803.01498), on products",
        averages="product",
        options=TrimmedMeanOptions,
        robust=True,
        weighted=False,
    ),
    Method(
        name="multikrum",
        title="Multi-Krum on the products",
        paper="Blanchard et al. 2017 (arXiv 1703.02757), on products",
        averages="product",
        options=MultiKrumOptions,
        robust=True,
    ),
    Method(
        name="geometric_median",
        title="Geometric median of the products",
        paper="RFA, Pillutla et al. 2022 (arXiv 1912.13445), on products",
        averages="product",
        options=GeometricMedianOptions,
        robust=True,
    ),
)
