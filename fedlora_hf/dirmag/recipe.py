"""What direction/magnitude LoRA adds to a LoRA configuration: the parts that train, the axes, the seed."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fedlora_hf.errors import ConfigError
from fedlora_hf.numerics.direction import Axis

PARTS = ("A.direction", "A.magnitude", "B.direction", "B.magnitude")
AXES = ("row", "column")


def checked_parts(parts: Iterable[str]) -> tuple[str, ...]:
    """`parts` in the order of PARTS, each once; a ConfigError when one is unknown or none is named."""
    named = [parts] if isinstance(parts, str) else list(parts)
    unknown = [part for part in named if part not in PARTS]
    if isinstance(parts, str) or unknown or not named:
        value = repr(parts if isinstance(parts, str) or not unknown else unknown[0])
        raise ConfigError(f"trainable_parts {value}: must be a list of at least one of {', '.join(PARTS)}; name these")
    return tuple(part for part in PARTS if part in named)


def names_in(factor: str, parts: Iterable[str]) -> frozenset[str]:
    """The parameters ("direction", "magnitude") of `factor` ("A" or "B") that `parts` name."""
    return frozenset(part.split(".")[1] for part in parts if part.startswith(factor))


@dataclass
class Recipe:
    """The fields of our own; on disk they go to a side-car, so that adapter_config.json stays a stock one."""

    trainable_parts: Any = PARTS
    axis_a: Axis = "row"
    axis_b: Axis = "row"
    direction_seed: int = 0

    def check_recipe(self) -> None:
        """Bring `trainable_parts` into its one order; ConfigError for a value that cannot be used."""
        self.trainable_parts = checked_parts(self.trainable_parts)
        for name in ("axis_a", "axis_b"):
            if getattr(self, name) not in AXES:
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be 'row' or 'column'; choose one of these")
        if not isinstance(self.direction_seed, int):
            raise ConfigError(f"direction_seed={self.direction_seed!r}: must be a whole number; 0 is the default")
