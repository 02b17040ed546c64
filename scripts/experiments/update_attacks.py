"""Attacks on the update itself: what a contaminated client sends instead of what it learned.

Each is a pure function of what the attacker may know: its own honest update, the adapter everybody started from, all
honest updates (for the attacks that need them) and a random generator that the contaminated clients share.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlora_hf.update import AdapterState, LoraFactors
from scripts.experiments.vectors import shaped, stacked

BOOST = 10.0
LITTLE = 1.5  # standard deviations; the paper's own number for so few clients is near 0 and does no harm


@dataclass(frozen=True, eq=False)
class Knowledge:
    """start: the common start. honest: the updates of the benign clients. seed: shared by the contaminated clients."""

    start: AdapterState
    honest: Sequence[AdapterState]
    seed: int


def times(state: AdapterState, factor: float) -> AdapterState:
    """`factor` W, with the factor in B: the scale is the framework's, not the client's."""
    return AdapterState({module: LoraFactors(f.A, factor * f.B, f.scale) for module, f in state.items()})


def gaussian(own: AdapterState, known: Knowledge, number: int) -> AdapterState:
    """Noise for what was learned: the change of every A and of every B has its own norm, and a random direction."""
    generator = torch.Generator().manual_seed((known.seed + number) % 2**62)

    def noise(change: Tensor) -> Tensor:
        drawn = torch.randn(change.shape, generator=generator)
        return drawn * (change.norm() / drawn.norm())

    factors = {}
    for module, f in own.items():
        start = known.start[module]
        factors[module] = LoraFactors(start.A + noise(f.A - start.A), start.B + noise(f.B - start.B), f.scale)
    return AdapterState(factors)


def copy_of_another(own: AdapterState, known: Knowledge, number: int) -> AdapterState:
    """All contaminated clients send the update of the same benign client."""
    return known.honest[int(np.random.default_rng(known.seed).integers(len(known.honest)))]


def little(own: AdapterState, known: Knowledge, number: int) -> AdapterState:
    """A little is enough (Baruch et al. 2019, arXiv 1902.06156): mean - LITTLE x standard deviation of the benign,
    entry by entry of A and of B; the attackers know all benign updates and send the same."""
    vectors = stacked(known.honest)
    return shaped(vectors.mean(0) - LITTLE * vectors.std(0), own)


UpdateAttack = Callable[[AdapterState, Knowledge, int], AdapterState]
UPDATE_ATTACKS: dict[str, UpdateAttack] = {
    "sign flip": lambda own, known, number: times(own, -1.0),
    "boost x10": lambda own, known, number: times(own, BOOST),
    "flip and boost": lambda own, known, number: times(own, -BOOST),
    "gaussian": gaussian,
    "zero": lambda own, known, number: times(own, 0.0),
    "copy of another": copy_of_another,
    "a little is enough": little,
}
