"""An adapter as one vector of its factors A and B, which is how the aggregators of other frameworks see it."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Sequence

import numpy as np
import torch

from fedlora_hf.update import AdapterState, LoraFactors

Vector = np.ndarray


def flat(state: AdapterState) -> Vector:
    """(d,) float32: A then B of every module, in the order of the modules' names."""
    parts = [factor.flatten() for factors in state.values() for factor in (factors.A, factors.B)]
    return torch.cat(parts).float().numpy()


def stacked(states: Sequence[AdapterState]) -> Vector:
    """(K, d)."""
    return np.stack([flat(state) for state in states])


def shaped(vector: Vector, like: AdapterState) -> AdapterState:
    """The adapter of `like`'s modules, ranks and scales whose factors are `vector`'s numbers."""
    numbers = iter(
        torch.as_tensor(vector).float().split([n for f in like.values() for n in (f.A.numel(), f.B.numel())])
    )
    factors = {}
    for module, old in like.items():
        A, B = next(numbers).view_as(old.A), next(numbers).view_as(old.B)
        factors[module] = LoraFactors(A.clone(), B.clone(), old.scale)
    return AdapterState(factors)
