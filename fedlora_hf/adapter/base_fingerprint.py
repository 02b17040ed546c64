"""One number that says which base weights an adapter was trained on: a resumed run must have the same."""
# SPDX-License-Identifier: Apache-2.0

import hashlib
from collections.abc import Container

import torch
from torch import nn

# A tensor of at most so many bytes is read whole; of a larger one, so many places of so many bytes, evenly spread.
WHOLE, PLACES, PLACE = 1 << 20, 64, 4096


def base_sha256(model: nn.Module, own: Container[int] = ()) -> str:
    """sha256 over names, shapes, dtypes and sampled bytes of a model's parameters; in hexadecimal.

    own: ids of parameters that are not the base's (an adapter's). A large tensor is sampled (256 KiB of it, our choice:
    7 billion parameters then cost a tenth of a second or so), so that other weights are seen, and one changed byte in a
    large tensor may not be.
    """
    found = hashlib.sha256()
    parameters = sorted(model.named_parameters(), key=lambda item: item[0])
    for name, parameter in parameters:
        if id(parameter) not in own:
            found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
            if parameter.device.type != "meta":
                found.update(_sample(parameter.detach()))
    return found.hexdigest()


def _sample(tensor: torch.Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    if flat.numel() > WHOLE:
        starts = [place * (flat.numel() - PLACE) // (PLACES - 1) for place in range(PLACES)]
        flat = torch.cat([flat[start : start + PLACE] for start in starts])
    return bytes(flat.cpu().numpy().tobytes())
