"""Small dense problems: a GPU loses more time starting on them than the CPU takes."""
# SPDX-License-Identifier: Apache-2.0

import torch
from torch import Tensor

# Rows up to which a symmetric matrix is decomposed on the CPU wherever it lies [our choice].
ON_CPU = 256


def eigh(H: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh` of H (..., n, n), its result where H is."""
    if H.device.type == "cpu" or H.shape[-1] > ON_CPU:
        values, vectors = torch.linalg.eigh(H)
    else:
        values, vectors = (part.to(H.device) for part in torch.linalg.eigh(H.cpu()))
    return values, vectors
