"""Clients that adapt different modules: what each way of going on with them costs, and the ways that fill or refuse."""
# SPDX-License-Identifier: Apache-2.0

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fedlora_hf.aggregation.screening import Shapes, examine, expected_shapes, mismatch
from fedlora_hf.errors import UpdateError
from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors


class _Filled(Mapping[str, LoraFactors]):
    """A state's factors and, for the modules that it lacks, factors of nothing but zeros (which take no memory)."""

    def __init__(self, state: AdapterState, missing: Mapping[str, tuple[tuple[int, ...], int, float]]) -> None:
        self._state, self._missing = state, missing

    def __getitem__(self, module: str) -> LoraFactors:
        if module in self._state:
            return self._state[module]
        (rows, columns), rank, scale = self._missing[module]
        zero = torch.zeros(1, 1)
        return LoraFactors(zero.expand(rank, columns), zero.expand(rows, rank), scale)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._state, *self._missing}))

    def __len__(self) -> int:
        return len({*self._state, *self._missing})


def shapes_of(updates: Sequence[ClientUpdate]) -> dict[str, Shapes]:
    """{client: shapes of its modules and whole tensors} of those whose update is sound so far: by the header of its
    file where there is one, else by its values."""
    found = {}
    for update in updates:
        shapes = update.state.outline.shapes if update.state.outline else examine(update)
        if not isinstance(shapes, str):
            found[str(update.client_id)] = shapes
    return found


def differing(found: Mapping[str, Shapes]) -> list[str]:
    """Names that some of the clients have and others lack, sorted."""
    counts = Counter(name for shapes in found.values() for name in shapes)
    return sorted(name for name, count in counts.items() if count < len(found))


def check_alike(updates: Sequence[ClientUpdate]) -> None:
    """UpdateError where sound updates are not all of the same modules."""
    found = shapes_of(updates)
    if odd := differing(found):
        lacking = sorted(client for client, shapes in found.items() if odd[0] not in shapes)
        raise UpdateError(
            f"partial_modules='refuse': {len(odd)} modules are not in all updates, {odd[0]} not in {lacking[0]}'s; "
            "train the same target modules, or choose quarantine, common or zero"
        )


def filled(updates: Sequence[ClientUpdate]) -> list[ClientUpdate]:
    """The updates, with zeros for modules that some sound client has and they lack: nothing was learnt there.

    A module's shape is the one that most clients have, its rank and scale are those of the first client with it. Whole
    tensors (a head) are not filled in: zeros are no head.
    """
    sound = [update for update in updates if not isinstance(examine(update), str)]
    shapes: dict[str, Counter[tuple[int, ...]]] = {}
    first: dict[str, LoraFactors] = {}
    lacking = {m for u in sound for m in u.state} - set.intersection(*({*u.state} for u in sound)) if sound else set()
    for module in sorted(lacking):
        for update in sound:
            if module in update.state:
                factors = update.state[module]
                first.setdefault(module, factors)
                shapes.setdefault(module, Counter())[factors.shape] += 1
    missing = {
        module: (max(shapes[module].items(), key=lambda item: (item[1], item[0]))[0], f.rank, f.scale)
        for module, f in first.items()
    }
    known = {id(update) for update in sound}
    return [_with_zeros(update, missing) if id(update) in known else update for update in updates]


def _with_zeros(update: ClientUpdate, missing: Mapping[str, tuple[tuple[int, ...], int, float]]) -> ClientUpdate:
    own = {module: facts for module, facts in missing.items() if module not in update.state}
    if not own:
        return update
    return replace(update, state=AdapterState(_Filled(update.state, own), update.state.extras))


def costs(updates: Sequence[ClientUpdate]) -> dict[str, Any]:
    """What each choice of `partial_modules` would cost these clients; {} where all have the same modules.

    quarantine: {"clients": those that would be left out}. common: {"modules": those left out for all, "share_of_norm":
    of the sum of squared Frobenius norms of all updates, 0 to 1}. zero: {"pairs": a client and a module that it lacks,
    "share": of all such pairs in those modules, 0 to 1: so far is their mean drawn to zero}.
    """
    found = shapes_of(updates)
    odd = differing(found)
    if not odd:
        return {}
    expected = expected_shapes(list(found.values()), None, "quarantine")
    left_out = sorted(client for client, shapes in found.items() if mismatch(shapes, expected, "quarantine"))
    lost = whole = 0.0
    for update in updates:
        if update.client_id in found:
            for module in update.state:
                try:
                    square = update.state[module].norm() ** 2
                except Exception:  # an update that cannot be read after all is quarantined by the screening
                    continue
                whole += square
                lost += square if module in odd else 0.0
    pairs = sum(name not in shapes for shapes in found.values() for name in odd)
    return {
        "quarantine": {"clients": left_out},
        "common": {"modules": odd, "share_of_norm": lost / whole if whole else 0.0},
        "zero": {"pairs": pairs, "share": pairs / (len(odd) * len(found))},
    }


def told(found: Mapping[str, Any], chosen: str) -> list[str]:
    """The costs as lines for a terminal; `chosen`: the choice in effect."""
    clients, modules = found["quarantine"]["clients"], found["common"]["modules"]
    some = ", ".join(clients[:5]) + (f" and {len(clients) - 5} more" if len(clients) > 5 else "")
    lines = {
        "quarantine": f"leaves out {len(clients)} clients ({some})",
        "common": f"leaves out {len(modules)} modules, {found['common']['share_of_norm']:.0%} of the updates' squared "
        "norm",
        "zero": f"counts {found['zero']['pairs']} missing modules as no change: {found['zero']['share']:.0%} of what "
        f"is averaged in {len(modules)} modules is zeros",
    }
    head = f"the adapters are not all of the same modules; --partial_modules {chosen} is in effect:"
    return [head, *(f"  {name:10} {line}{' (chosen)' if name == chosen else ''}" for name, line in lines.items())]
