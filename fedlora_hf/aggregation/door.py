"""The door: every update is looked at before it can touch a mean; what cannot be used is quarantined with a reason."""
# SPDX-License-Identifier: Apache-2.0

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedlora_hf.errors import UpdateError
from fedlora_hf.update import AdapterState, ClientUpdate, sorted_updates

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def screen(
    updates: Iterable[ClientUpdate], reference: AdapterState | None = None
) -> tuple[tuple[ClientUpdate, ...], dict[str, str]]:
    """(usable updates sorted by id, {client id: reason}).

    Modules and shapes are the reference's where there is one, else those that most clients have. A repeated id is
    an UpdateError: nobody can say which of the two is the client.
    """
    updates = sorted_updates(updates)
    repeated = [client for client, n in Counter(update.client_id for update in updates).items() if n > 1]
    if repeated:
        raise UpdateError(f"client id {repeated[0]!r} comes twice: ids must differ; rename one of the two")
    quarantined: dict[str, str] = {}
    signatures = {}
    for update in updates:
        reason, signature = _inspect(update)
        if reason:
            quarantined[update.client_id] = reason
        else:
            signatures[update.client_id] = signature
    if reference is not None:
        expected = {name: reference[name].shape for name in reference}
    elif signatures:
        shapes = Counter(tuple(sorted(signature.items())) for signature in signatures.values())
        expected = dict(max(shapes, key=lambda signature: (shapes[signature], signature)))
    for client, signature in signatures.items():
        reason = _mismatch(signature, expected)
        if reason:
            quarantined[client] = reason
    usable = tuple(update for update in updates if update.client_id not in quarantined)
    return usable, dict(sorted(quarantined.items()))


def _inspect(update: ClientUpdate) -> tuple[str | None, dict[str, tuple[int, int]]]:
    """(why the update cannot be used or None, {module: (out, in)}); one module in memory at a time."""
    shapes: dict[str, tuple[int, int]] = {}
    try:
        if update.num_examples is not None and not 0 < update.num_examples < 2**53:
            return f"num_examples={update.num_examples}: must be a positive count", shapes
        if not len(update.state):
            return "no LoRA modules in the update", shapes
        for module, factors in update.state.items():
            if not (factors.scale == factors.scale and 0 < abs(factors.scale) < 1e6):
                return f"{module}: scale {factors.scale} is not a finite number other than 0", shapes
            for name, tensor in (("A", factors.A), ("B", factors.B)):
                reason = _unsound(tensor)
                if reason:
                    return f"{module}: {name} {reason}", shapes
            if not factors.rank:
                return f"{module}: rank 0", shapes
            shapes[module] = factors.shape
        for name, tensor in update.state.extras.items():
            reason = _unsound(tensor)
            if reason:
                return f"{name}: {reason}", shapes
    except (UpdateError, OSError) as error:
        return str(error), shapes
    return None, shapes


def _unsound(tensor: Tensor) -> str | None:
    if tensor.dtype not in FLOATS:
        return f"has dtype {tensor.dtype}; float16, bfloat16, float32 or float64 is needed"
    # One pass: the sum of squares is finite only if every entry is finite and none is absurdly large.
    if not torch.isfinite(tensor.to(torch.float64).square().sum()) or not torch.isfinite(tensor.abs().float().sum()):
        return "is not finite (NaN or Inf)"
    return None


def _mismatch(found: Mapping[str, tuple[int, int]], expected: Mapping[str, tuple[int, int]]) -> str | None:
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing:
        return f"wrong modules: {len(missing)} missing, {missing[0]} for one"
    if extra:
        return f"wrong modules: {len(extra)} too many, {extra[0]} for one"
    for module in expected:
        if found[module] != expected[module]:
            return f"wrong shape: {module} is {found[module]}, must be {expected[module]}"
    return None
