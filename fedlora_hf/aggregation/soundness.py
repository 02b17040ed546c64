"""What the numbers of one adapter may be: finite, of a float dtype, and small enough that no method can overflow."""
# SPDX-License-Identifier: Apache-2.0

from math import isfinite, prod

import torch
from torch import Tensor

from fedlora_hf.update import AdapterState, LoraFactors

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# No trained adapter holds such an entry, nor so many of them that the norm of A or of scale * B comes to as much.
LARGEST_ENTRY = 1e6
# Scales are alpha / r. Both ends bound what a factor grows to when an update is written with another client's scale.
LARGEST_SCALE, LEAST_SCALE = 1e6, 1e-6
# Of |scale| |B| |A|, which the norm of scale * B @ A cannot exceed: its square stays far within float32 [our choice].
LARGEST_NORM = 1e8
# A round may begin with an adapter above that (a plain mean of hostile factors); who goes on from it is not to blame.
FROM_THE_START = 10.0
# No layer has so many inputs or outputs: the largest vocabularies have some 10^6 entries [our choice].
LARGEST_SIDE = 2**22


def unsound_state(state: AdapterState) -> str | None:
    """Why training cannot resume from an adapter (unreadable, not finite), or None; one pass over its entries."""
    for tensors in ([factors.A, factors.B] for factors in state.values()):
        if reason := next(filter(None, map(unsound, tensors)), None):
            return f"its adapter {reason}"
    return next((f"{name} {why}" for name in state.extras if (why := unsound(state.extras[name]))), None)


def far_within(state: AdapterState, reference: AdapterState | None = None) -> bool:
    """Whether the values of all factors are so far within every bound that none need be looked at again, in one call
    for all of them; False says nothing. A norm bounds each entry, and one that is not finite tells of such an entry."""
    factors = list(state.values())
    tensors = [tensor for f in factors if isinstance(f, LoraFactors) for tensor in (f.A, f.B)]
    if not tensors or len(tensors) < 2 * len(factors) or not all(map(_plain, tensors)):
        return False
    norms = torch.stack(torch._foreach_norm([tensor.detach() for tensor in tensors])).tolist()
    for (module, own), norm_A, norm_B in zip(state.items(), norms[::2], norms[1::2], strict=True):
        unit = abs(reference[module].scale) if reference is not None and module in reference else 1.0
        scaled = abs(own.scale) * norm_B
        bounds = ((norm_A, LARGEST_ENTRY), (norm_B, LARGEST_ENTRY), (scaled, LARGEST_ENTRY * unit))
        # Twice the norms, for their rounding in whatever dtype they come; no comparison with NaN is true.
        if not (all(2 * norm <= bound for norm, bound in bounds) and 4 * norm_A * scaled <= LARGEST_NORM):
            return False
    return True


def _plain(tensor: object) -> bool:
    """Whether it is a tensor on the CPU with values of a float dtype that norms can be taken of."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.dtype in FLOATS and tensor.numel() > 0


def unsound_factors(factors: object, start: LoraFactors | None = None, values: bool = True) -> str | None:
    """Why one module's factors cannot be used, or None. start: those that the round began with. values: whether they
    are still to be looked at."""
    if not isinstance(factors, LoraFactors):
        return f"is {type(factors).__name__}, not LoraFactors"
    if reason := unsound_shape(factors.shape, factors.rank):
        return reason
    if values:
        return _unsound_values(factors, start)
    return _unsound_scale(factors)


def _unsound_values(factors: LoraFactors, start: LoraFactors | None) -> str | None:
    largest = []
    for name, tensor in (("A", factors.A), ("B", factors.B)):
        size, reason = _looked_at(tensor)
        if reason:
            return f"{name} {reason}"
        largest.append(size)
    return _unsound_scale(factors) or _too_large(factors, largest[0], largest[1], start)


def _unsound_scale(factors: LoraFactors) -> str | None:
    if isfinite(factors.scale) and LEAST_SCALE <= abs(factors.scale) <= LARGEST_SCALE:
        return None
    return f"scale {factors.scale} is not a number of size {LEAST_SCALE:g} to {LARGEST_SCALE:g}"


def unsound_shape(shape: tuple[int, ...], rank: int) -> str | None:
    """Why no layer has factors of such a product (out, in) and rank, or None; needs no values."""
    if max(shape) > LARGEST_SIDE:
        return f"has shape {tuple(shape)}: no layer has a side above {LARGEST_SIDE}"
    if rank > sum(shape):
        return f"rank {rank} is above out + in = {sum(shape)}: larger than any matrix of that shape needs"
    return None


def unsound(tensor: object) -> str | None:
    """Why a tensor cannot be used, or None; one pass over its entries."""
    return _looked_at(tensor)[1]


def _looked_at(tensor: object) -> tuple[float, str | None]:
    """(the size of a tensor's largest entry, why it cannot be used or None)."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        return 0.0, "is not a dense tensor with values"
    if tensor.dtype not in FLOATS:
        return 0.0, f"has dtype {tensor.dtype}; float16, bfloat16, float32 or float64 is needed"
    if not tensor.numel():
        return 0.0, f"is empty, of shape {tuple(tensor.shape)}"
    low, high = (float(bound) for bound in tensor.detach().aminmax())
    if not (isfinite(low) and isfinite(high)):
        return 0.0, "is not finite (NaN or Inf)"
    size = max(-low, high)
    if size > LARGEST_ENTRY:
        return size, f"has an entry of size {size:.3g}, above {LARGEST_ENTRY:g}: no trained adapter has"
    return size, None


def _too_large(factors: LoraFactors, largest_A: float, largest_B: float, start: LoraFactors | None) -> str | None:
    """Why factors whose entries are small enough make too large an update together, or None.

    No mean of factors within these bounds, and no product of them, leaves them, so neither does the aggregate. Entries
    alone tell for nearly every adapter; the norms are computed, in float64, where they do not.
    """
    scale, unit = abs(factors.scale), 1.0 if start is None else abs(start.scale)
    norm_A, norm_B = largest_A * prod(factors.A.shape) ** 0.5, scale * largest_B * prod(factors.B.shape) ** 0.5
    if norm_A <= LARGEST_ENTRY and norm_B <= LARGEST_ENTRY * unit and norm_A * norm_B <= LARGEST_NORM:
        return None
    norm_A, norm_B = _norm(factors.A), scale * _norm(factors.B)
    for name, norm, bound in (("A", norm_A, LARGEST_ENTRY), ("scale * B", norm_B, LARGEST_ENTRY * unit)):
        if norm > bound:
            return f"{name} has norm {norm:.3g}, above {bound:g}: no trained adapter's is"
    most = LARGEST_NORM
    if norm_A * norm_B > most and start is not None:
        most = max(most, FROM_THE_START * unit * _norm(start.A) * _norm(start.B))
    if norm_A * norm_B > most:
        return f"scale * B @ A has |scale| |B| |A| = {norm_A * norm_B:.3g}, above {most:g}: no trained adapter's is"
    return None


def _norm(matrix: Tensor) -> float:
    """Frobenius norm, in float64."""
    return float(torch.linalg.vector_norm(matrix.detach(), dtype=torch.float64))
