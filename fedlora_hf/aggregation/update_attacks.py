"""What a contaminated client sends instead of what it learned, knowing nothing but its own update.

On the change D = W - W_0 from the round's start, in product space: what is sent is an ordinary adapter of the client's
rank. For rehearsals (`--contaminate`); nothing here runs otherwise.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Container, Mapping

import torch
from torch import Tensor

from fedlora_hf.errors import ConfigError
from fedlora_hf.update import AdapterState, LoraFactors
from fedlora_hf.util.rehearsal import Contamination
from fedlora_hf.util.seeding import derive_seed

# {kind: (what it does to the change, with "x" its strength; the strength that is taken where none is given)}
KINDS: Mapping[str, tuple[str, float]] = {
    "sign_flip": ("-x times the change", 1.0),
    "boost": ("x times the change", 10.0),
    "gaussian": ("noise of x times the change's norm, module by module", 1.0),
    "zero": ("nothing: the round's start", 0.0),
}


def attacked(
    contamination: Contamination, state: AdapterState, start: AdapterState, seed: int, untrained: Container[str] = ()
) -> AdapterState:
    """What is sent in place of `state` by a client that started from `start`.

    seed: what noise is drawn from. untrained: a factor that stays frozen, to the bit, under the attack too.
    modules_to_save tensors are treated alike, but for noise: that is the factors' alone.
    """
    kind = contamination.kind
    if kind not in KINDS:
        raise ConfigError(f"update attack {kind!r}: must be one of {', '.join(KINDS)}; choose one")
    strength = KINDS[kind][1] if contamination.strength is None else contamination.strength
    factor = {"sign_flip": -strength, "boost": strength, "zero": 0.0}.get(kind)
    factors = {}
    for module, own in state.items():
        before = start[module].rescaled(own.scale).padded(own.rank)
        drawn = torch.Generator().manual_seed(derive_seed(seed, "attack", module))
        if "A" in untrained or "B" in untrained:  # the change of a product with one factor frozen is the other's
            A = own.A if "A" in untrained else _moved(before.A, own.A, factor, strength, drawn)
            B = own.B if "B" in untrained else _moved(before.B, own.B, factor, strength, drawn)
            factors[module] = LoraFactors(A, B, own.scale)
        elif factor == 0:
            factors[module] = before
        else:
            change = own - before
            change = _noise(change, own, strength, drawn) if factor is None else change * factor
            factors[module] = (before + change).truncated(own.rank, own.scale)[0]
    extras = dict(state.extras)
    if factor is not None:
        extras = {name: start.extras[name] + factor * (t - start.extras[name]) for name, t in state.extras.items()}
    return AdapterState(factors, extras)


def _moved(before: Tensor, after: Tensor, factor: float | None, strength: float, generator: torch.Generator) -> Tensor:
    change = after - before
    if factor is not None:
        return before + factor * change
    noise = torch.randn(change.shape, generator=generator).to(change)
    return before + noise * (strength * change.norm() / noise.norm())


def _noise(change: LoraFactors, own: LoraFactors, strength: float, generator: torch.Generator) -> LoraFactors:
    A = torch.randn(own.A.shape, generator=generator)
    B = torch.randn(own.B.shape, generator=generator)
    drawn = LoraFactors(A.to(own.A.device), B.to(own.B.device))
    return drawn * (strength * change.norm() / drawn.norm())
