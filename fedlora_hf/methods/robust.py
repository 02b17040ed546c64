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


@dataclass(frozen=True)
class NormClippingOptions:
    """max_norm: longest change of a client in a round, the Frobenius norm over all modules; default the median of the
    round's norms [our choice; the paper fixes a number]."""

    max_norm: float | None = None

    def __post_init__(self) -> None:
        if self.max_norm is not None and not 0 < self.max_norm < float("inf"):
            raise ConfigError(f"max_norm={self.max_norm}: must be above 0; leave it out for the median of the norms")


@dataclass(frozen=True)
class CentredClippingOptions:
    """radius: tau, to which a distance from the centre is clipped, a Frobenius norm over all modules; default, in every
    step, the median distance [our choice]. steps: how often; the paper takes one to three."""

    radius: float | None = None
    steps: int = 3

    def __post_init__(self) -> None:
        if self.radius is not None and not 0 < self.radius < float("inf"):
            raise ConfigError(f"radius={self.radius}: must be above 0; leave it out for the median distance")
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps}: must be at least 1; choose 3 for instance")


@dataclass(frozen=True)
class BulyanOptions:
    """num_contaminated: f, how many clients may be contaminated; default, and at most, floor((K - 3) / 4)."""

    num_contaminated: int | None = None

    def __post_init__(self) -> None:
        if self.num_contaminated is not None and self.num_contaminated < 0:
            raise ConfigError(f"num_contaminated={self.num_contaminated}: must be at least 0; leave it out for most")


METHODS = (
    Method(
        name="median",
        title="Coordinate-wise median of the products",
        paper="Yin et al. 2018 (arXiv 1803.01498), on products",
        averages="product",
        robust=True,
        weighted=False,
        uniform=True,
    ),
    Method(
        name="trimmed_mean",
        title="Coordinate-wise trimmed mean of the products",
        paper="Yin et al. 2018 (arXiv 1803.01498), on products",
        averages="product",
        options=TrimmedMeanOptions,
        robust=True,
        weighted=False,
        uniform=True,
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
    Method(
        name="norm_clipping",
        title="Mean of the changes, each clipped to a norm",
        paper="Sun et al. 2019 (arXiv 1911.07963), on products",
        averages="product",
        options=NormClippingOptions,
        robust=True,
        weighted=False,
    ),
    Method(
        name="centred_clipping",
        title="Centred clipping of the changes",
        paper="Karimireddy et al. 2021 (arXiv 2012.10333), on products",
        averages="product",
        options=CentredClippingOptions,
        robust=True,
        weighted=False,
    ),
    Method(
        name="bulyan",
        title="Bulyan on the products",
        paper="El Mhamdi et al. 2018 (arXiv 1802.07927), on products",
        averages="product",
        options=BulyanOptions,
        robust=True,
        weighted=False,
        uniform=True,
    ),
    Method(
        name="fltrust",
        title="Weights by the cosine with the server's own update",
        paper="FLTrust, Cao et al. 2021 (arXiv 2012.13995), on products",
        averages="product",
        robust=True,
        weighted=False,
        uniform=True,
        needs_server=True,
    ),
)
