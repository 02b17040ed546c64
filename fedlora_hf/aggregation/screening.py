"""Screening: an update is checked before it can enter a mean; one that cannot be used is quarantined, with a reason."""
# SPDX-License-Identifier: Apache-2.0

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from math import isfinite
from numbers import Integral
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedlora_hf.errors import UpdateError, one_line
from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors, sorted_updates
from fedlora_hf.util.names import unfit_reason

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# No trained adapter holds such an entry; below it, products and squared norms stay finite in float32 and float64.
LARGEST_ENTRY = 1e6
LARGEST_SCALE = 1e6
LONGEST_NAME = 300

# {module: (out, in), name of a modules_to_save tensor: its shape}
Shapes = Mapping[str, tuple[int, ...]]
PartialModules = Literal["quarantine", "common"]


class Screened(NamedTuple):
    """Usable updates sorted by id, all with the same modules and whole tensors; {client id: reason} of the others; the
    modules' names; the names of what was taken from some usable update because not all have it. All sorted."""

    usable: tuple[ClientUpdate, ...]
    quarantined: dict[str, str]
    modules: tuple[str, ...]
    left_out: tuple[str, ...]


def screen(
    updates: Iterable[ClientUpdate],
    reference: AdapterState | None = None,
    partial_modules: PartialModules = "quarantine",
) -> Screened:
    """Sort the cohort into usable and quarantined. Reads every tensor once, one module of one client at a time.

    Modules and shapes must be the reference's where there is one, else those that most sound clients have (a tie goes
    to the larger set, then to the later in the alphabet). With partial_modules="common" every client needs only the
    modules that all sound clients (and the reference) have, and the rest is left out for all.

    A repeated id is an UpdateError: nobody can say which of the two is the client.
    """
    updates = sorted_updates(updates)
    counts = Counter(str(update.client_id) for update in updates)
    repeated = [client_id for client_id in counts if counts[client_id] > 1]
    if repeated:
        raise UpdateError(f"client id {repeated[0][:40]!r} comes twice: ids must differ; rename one of the two")
    quarantined: dict[str, str] = {}
    found: dict[str, Shapes] = {}
    for update in updates:
        result = examine(update)
        if isinstance(result, str):
            quarantined[str(update.client_id)] = result
        else:
            found[update.client_id] = result
    expected = expected_shapes(list(found.values()), reference, partial_modules)
    for client_id, shapes in found.items():
        reason = mismatch(shapes, expected, partial_modules)
        if reason:
            quarantined[client_id] = reason
    quarantined = {client_id: one_line(reason, 400) for client_id, reason in sorted(quarantined.items())}
    usable = tuple(update for update in updates if str(update.client_id) not in quarantined)
    left_out = set().union(*(found[update.client_id] for update in usable)) - set(expected)
    if left_out:
        usable = tuple(replace(update, state=update.state.restricted(expected)) for update in usable)
    modules = tuple(usable[0].state) if usable else ()
    return Screened(usable, quarantined, modules, tuple(sorted(left_out)))


def examine(update: ClientUpdate) -> Shapes | str:
    """The shapes of everything in the update, or why it cannot be used, in one line."""
    reason = unfit_reason(update.client_id)
    if reason:
        return reason
    count = update.num_examples
    if count is not None and (not isinstance(count, Integral) or isinstance(count, bool) or not 0 < count < 2**53):
        return f"num_examples={count!r}: must be a positive whole number, or None for not known"
    shapes: dict[str, tuple[int, ...]] = {}
    for name in (*update.state, *update.state.extras):
        if not isinstance(name, str) or not name.isprintable() or len(name) > LONGEST_NAME:
            return f"{str(name)[:80]!r} is no name of a module: must be printable, at most {LONGEST_NAME} characters"
    try:
        for module, factors in update.state.items():
            reason = unsound_factors(factors)
            if reason:
                return f"{module}: {reason}"
            shapes[module] = factors.shape
        for name, tensor in update.state.extras.items():
            reason = unsound(tensor)
            if reason:
                return f"{name}: {reason}"
            shapes[name] = tuple(tensor.shape)
    except Exception as error:  # whatever reading a client's file raises, it is that client who cannot be used
        return f"cannot be read: {str(error) or type(error).__name__}"
    return shapes if len(update.state) else "no LoRA modules in the update"


def checked_server(server: AdapterState, client: ClientUpdate, modules: Container[str]) -> AdapterState:
    """The server's own update, of the modules that the clients have; UpdateError when it cannot be compared."""
    kept = server.restricted({*(module for module in server if module in modules), *client.state.extras})
    found = examine(ClientUpdate("server", kept))
    expected: dict[str, tuple[int, ...]] = {module: client.state[module].shape for module in client.state}
    expected |= {name: tuple(tensor.shape) for name, tensor in client.state.extras.items()}
    reason = found if isinstance(found, str) else mismatch(found, expected, "quarantine")
    if reason:
        raise UpdateError(f"the server's own update: {one_line(reason, 400)}; train it from the clients' start")
    return kept


def unsound_state(state: AdapterState) -> str | None:
    """Why training cannot resume from an adapter (unreadable, not finite), or None; one pass over its entries."""
    for tensors in ([factors.A, factors.B] for factors in state.values()):
        if reason := next(filter(None, map(unsound, tensors)), None):
            return f"its adapter {reason}"
    return next((f"{name} {why}" for name in state.extras if (why := unsound(state.extras[name]))), None)


def unsound_factors(factors: object) -> str | None:
    """Why one module's factors cannot be used, or None."""
    if not isinstance(factors, LoraFactors):
        return f"is {type(factors).__name__}, not LoraFactors"
    for name, tensor in (("A", factors.A), ("B", factors.B)):
        reason = unsound(tensor)
        if reason:
            return f"{name} {reason}"
    if not (isfinite(factors.scale) and 0 < abs(factors.scale) <= LARGEST_SCALE):
        return f"scale {factors.scale} is not a number other than 0, of size at most {LARGEST_SCALE:g}"
    if factors.rank > sum(factors.shape):
        return (
            f"rank {factors.rank} is above out + in = {sum(factors.shape)}: larger than any matrix of that shape needs"
        )
    return None


def unsound(tensor: object) -> str | None:
    """Why a tensor cannot be used, or None; one pass over its entries."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        return "is not a dense tensor with values"
    if tensor.dtype not in FLOATS:
        return f"has dtype {tensor.dtype}; float16, bfloat16, float32 or float64 is needed"
    if not tensor.numel():
        return f"is empty, of shape {tuple(tensor.shape)}"
    low, high = (float(bound) for bound in tensor.detach().aminmax())
    if not (isfinite(low) and isfinite(high)):
        return "is not finite (NaN or Inf)"
    if max(-low, high) > LARGEST_ENTRY:
        return f"has an entry of size {max(-low, high):.3g}, above {LARGEST_ENTRY:g}: no trained adapter has"
    return None


def expected_shapes(found: list[Shapes], reference: AdapterState | None, partial_modules: PartialModules) -> Shapes:
    """The shapes that an update must have: the reference's, else the clients' majority (see `screen`)."""
    majority: Shapes = {}
    if partial_modules == "common" and found:
        votes = Counter(item for shapes in found for item in shapes.items())
        common = set.intersection(*(set(shapes) for shapes in found))
        majority = {name: max((votes[item], item[1]) for item in votes if item[0] == name)[1] for name in common}
    elif found:
        whole = Counter(tuple(sorted(shapes.items())) for shapes in found)
        majority = dict(max((count, len(shapes), shapes) for shapes, count in whole.items())[2])
    if reference is None:
        return majority
    fixed: dict[str, tuple[int, ...]] = {module: reference[module].shape for module in reference}
    fixed |= {name: tuple(tensor.shape) for name, tensor in reference.extras.items()}
    if partial_modules == "common":
        return {name: shape for name, shape in fixed.items() if name in majority}
    return fixed


def mismatch(found: Shapes, expected: Shapes, partial_modules: PartialModules) -> str | None:
    """Why an update's modules or shapes are not the expected ones, or None."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing:
        return f"wrong modules: {len(missing)} missing, {missing[0]} for one"
    if extra and partial_modules == "quarantine":
        return f"wrong modules: {len(extra)} too many, {extra[0]} for one"
    for name, shape in expected.items():
        if found[name] != shape:
            return f"wrong shape: {name} is {found[name]}, must be {shape}"
    return None
