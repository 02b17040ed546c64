"""Where a round is aggregated: `auto`, `cpu` or `cuda[:n]`, and whether its largest module fits there."""
# SPDX-License-Identifier: Apache-2.0

import re
from collections.abc import Sequence

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
    if not torch.cuda.is_available() or _needed(updates) > torch.cuda.mem_get_info()[0]:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, torch's own reserve included; of a CPU 0: nothing is gathered there."""
    if device.type != "cuda":
        return 0
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserved


def moved(state: AdapterState, device: torch.device) -> AdapterState:
    """The state with its factors on a device; extras stay where they are."""
    return AdapterState({module: factors.to(device) for module, factors in state.items()}, state.extras)


def _needed(updates: Sequence[ClientUpdate]) -> int:
    """Bytes to work on the largest module in, by the first client's ranks."""
    sizes = [(f.rank * sum(f.shape) * len(updates), f.shape[0] * f.shape[1]) for f in updates[0].state.values()]
    return max(8 * COPIES * (factors + dense) for factors, dense in sizes) + BESIDE
