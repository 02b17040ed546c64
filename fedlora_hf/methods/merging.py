"""Merging of adapters trained anywhere: their options and what they say of themselves."""
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass

from fedlora_hf.errors import ConfigError
from fedlora_hf.methods.method import Method


@dataclass(frozen=True)
class TiesOptions:
    """density: share of the entries of each product W_k that is kept, the largest (1: nothing is trimmed)."""

    density: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ConfigError(f"density={self.density}: must be above 0 and at most 1; choose 0.2 for instance")


@dataclass(frozen=True)
class DareOptions:
    """density: share of the entries of each product W_k that is kept (1: all, which is product_mean to the bit).
    seed: what the draws follow from, with the client's id and the module's name."""

    density: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ConfigError(f"density={self.density}: must be above 0 and at most 1; choose 0.5 for instance")


METHODS = (
    Method(
        name="ties",
        title="TIES merging of the products",
        paper="Yadav et al. 2023 (arXiv 2306.01708), on products",
        averages="product",
        options=TiesOptions,
        weighted=False,
    ),
    Method(
        name="dare",
        title="DARE: random entries of the products dropped, the mean rescaled",
        paper="Yu et al. 2023 (arXiv 2311.03099), on products",
        averages="product",
        options=DareOptions,
        weighted=False,
    ),
)
