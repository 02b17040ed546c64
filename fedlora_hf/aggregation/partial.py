"""Rounds that train a part of the adapter only: the mean of what was trained, everything else as it was."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedlora_hf.numerics import direction
from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors


def mean_of_trained(
    updates: Sequence[ClientUpdate], weights: Mapping[str, float], start: AdapterState, parts: Iterable[str]
) -> AdapterState:
    """The adapter after a round in which `parts` ("A", "B", "A.direction" ...) were trained from `start`.

    With one factor common to all clients the mean of the other is the exact mean of the products, and nothing has to
    be re-factored. Where the magnitude was not trained the mean is given the start's row norms again, so that
    directions are averaged on the sphere [our choice; arXiv 2510.11274 as known to us fixes no rule].
    """
    chosen = set(parts)
    factors = {}
    for module in start:
        base = start[module]
        clients = [(weights[u.client_id], u.state[module].rescaled(base.scale)) for u in updates]
        A = _mean([(w, f.A) for w, f in clients], base.A, "A", chosen)
        factors[module] = LoraFactors(A, _mean([(w, f.B) for w, f in clients], base.B, "B", chosen), base.scale)
    return AdapterState(factors, start.extras)


def _mean(weighted: Sequence[tuple[float, Tensor]], start: Tensor, factor: str, parts: set[str]) -> Tensor:
    if not any(part.startswith(factor) for part in parts):
        return start
    mean = torch.zeros_like(start, dtype=torch.float64)
    for weight, matrix in weighted:
        if weight:
            mean += weight * matrix.double()
    if f"{factor}.direction" in parts and f"{factor}.magnitude" not in parts:
        magnitude = torch.linalg.vector_norm(start.double(), dim=1, keepdim=True)
        mean = direction.fold(magnitude, mean, "row")
    return mean.to(start.dtype)
