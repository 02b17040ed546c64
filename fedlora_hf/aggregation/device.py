"""Where a round is aggregated: `auto`, `cpu` or `cuda[:n]`, and whether all clients' factors fit there at once."""
# SPDX-License-Identifier: Apache-2.0

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from fedlora_hf.errors import ConfigError
from fedlora_hf.update import AdapterState, ClientUpdate

CHOICES = re.compile(r"auto|cpu|cuda(:\d+)?")
# What a module is worked on in takes, in sizes of its clients' factors and its dense matrix, in float64; and beside it.
COPIES, BESIDE = 4, 2**30


def checked_device(choice: str) -> str:
    """The choice; ConfigError where it is none, or names a device that this machine does not have."""
    if not isinstance(choice, str) or not CHOICES.fullmatch(choice):
        raise ConfigError(f"aggregation_device={choice!r}: must be auto, cpu, cuda or cuda:0 and so on; choose one")
    if choice.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(choice.partition(":")[2] or 0) >= count:
            raise ConfigError(f"aggregation_device={choice}: this machine has {count} CUDA devices; pass auto or cpu")
    return choice


def chosen_device(choice: str, updates: Sequence[ClientUpdate]) -> torch.device:
    """The device of a cohort: as asked for; by "auto" the current CUDA device when the largest module's stack of
    factors and what it is worked on in fit into its free memory, otherwise the CPU."""
    if checked_device(choice) != "auto":
        return torch.device(choice)
    if not torch.cuda.is_available() or _needed(updates)[0] > torch.cuda.mem_get_info()[0]:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def placed(
    updates: Sequence[ClientUpdate],
    device: torch.device,
    free: Callable[[torch.device], int] = lambda device: torch.cuda.mem_get_info(device)[0],
) -> tuple[ClientUpdate, ...]:
    """The updates with all factors on a device that is not the CPU, where they fit beside what one module is worked on
    in; otherwise as they are, to be moved module by module (`Cohort.factors`)."""
    if device.type == "cpu":
        return tuple(updates)
    work, factors = _needed(updates)
    if work + factors > free(device):
        return tuple(updates)
    return tuple(replace(update, state=moved(update.state, device)) for update in updates)


def moved(state: AdapterState, device: torch.device) -> AdapterState:
    """The state with its factors on a device; extras stay where they are."""
    return AdapterState({module: factors.to(device) for module, factors in state.items()}, state.extras)


def _needed(updates: Sequence[ClientUpdate]) -> tuple[int, int]:
    """(bytes to work on the largest module in, bytes of all factors in float32), by the first client's ranks."""
    sizes = [(f.rank * sum(f.shape) * len(updates), f.shape[0] * f.shape[1]) for f in updates[0].state.values()]
    return max(8 * COPIES * (factors + dense) for factors, dense in sizes) + BESIDE, 4 * sum(size[0] for size in sizes)
