"""Direction/magnitude LoRA: `A = A_M * A_D`, `B = B_M * B_D`, each part trainable by itself (arXiv 2510.11274).

Maths, choices and costs: docs/direction_magnitude.md.
"""
# SPDX-License-Identifier: Apache-2.0

from fedlora_hf.dirmag.config import SIDECAR, DirectionPhaseConfig, DirMagLoraConfig, MagnitudePhaseConfig
from fedlora_hf.dirmag.layer import DirMagLinear
from fedlora_hf.dirmag.model import (
    Size,
    is_dirmag,
    load_native_state,
    native_state,
    part_sizes,
    phase_size,
    set_trainable_parts,
    write_factor,
)
from fedlora_hf.dirmag.recipe import PARTS

__all__ = [
    "PARTS",
    "SIDECAR",
    "DirMagLinear",
    "DirMagLoraConfig",
    "DirectionPhaseConfig",
    "MagnitudePhaseConfig",
    "Size",
    "is_dirmag",
    "load_native_state",
    "native_state",
    "part_sizes",
    "phase_size",
    "set_trainable_parts",
    "write_factor",
]
