"""Every client alone, and the averaging methods: their options and what they say of themselves."""
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass
from typing import Literal

from fedlora_hf.errors import ConfigError
from fedlora_hf.methods.method import Method


@dataclass(frozen=True)
class DirMagMeanOptions:
    """axis_a, axis_b: "row" or "column", what a magnitude belongs to; the adapters' own (DirMagLoraConfig) is best."""

    axis_a: Literal["row", "column"] = "row"
    axis_b: Literal["row", "column"] = "row"

    def __post_init__(self) -> None:
        for name in ("axis_a", "axis_b"):
            if getattr(self, name) not in ("row", "column"):
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be 'row' or 'column'; choose one of these")


METHODS = (
    Method(
        name="local",
        title="Every client alone",
        paper="no federation: a baseline",
        averages="product",
        keeps=("A", "B"),
        global_adapter="the mean of the clients' own adapters, for comparison: nobody trains or uses it",
    ),
    Method(
        name="fedavg",
        title="Federated averaging of the LoRA factors",
        paper="McMahan et al. 2017 (arXiv 1602.05629); on LoRA: FedIT, Zhang et al. 2023 (arXiv 2305.05644)",
        averages="factors",
    ),
    Method(
        name="product_mean",
        title="Exact mean of the products, re-factored",
        paper="FlexLoRA, Bai et al. 2024 (arXiv 2402.11505); the re-factoring is ours",
        averages="product",
    ),
    Method(
        name="stacking",
        title="Stacked factors",
        paper="FLoRA, Wang et al. 2024 (arXiv 2409.05976)",
        averages="product",
        restarts=True,
    ),
    Method(
        name="fedex",
        title="Mean of the factors plus the exact residual",
        paper="FedEx-LoRA, Singhal et al. 2024 (arXiv 2410.09432); the residual as extra rank is ours",
        averages="product",
        residual=True,
    ),
    Method(
        name="ffa",
        title="Frozen A, averaged B",
        paper="FFA-LoRA, Sun et al. 2024 (arXiv 2403.12313)",
        averages="product",
        trains=("B",),
    ),
    Method(
        name="rolora",
        title="B and A trained in turn, round by round",
        paper="RoLoRA, Chen et al. 2024 (arXiv 2409.02346)",
        averages="product",
        turns=(("B",), ("A",)),
    ),
    Method(
        name="fedsa",
        title="Shared A, own B",
        paper="FedSA-LoRA, Guo et al. 2024 (arXiv 2410.01463); the global adapter is our choice",
        averages="factors",
        keeps=("B",),
        global_adapter="the mean of the clients' A with the mean of their B, as fedavg's: the method has none; a "
        "client's own adapter is the mean A with its own B",
    ),
    Method(
        name="dirmag_mean",
        title="Component-wise mean of magnitudes and directions",
        paper="the components of FedLoRA-Optimizer, Zhao et al. 2025 (arXiv 2510.11274); the mean is our choice",
        averages="factors",
        options=DirMagMeanOptions,
    ),
)
