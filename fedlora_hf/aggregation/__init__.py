"""Aggregation: one method, one file, one pure function; `aggregate` is their common entry point.

```python
import torch

from fedlora_hf import aggregate
from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors

updates = []
for seed, name in enumerate(("ada", "bob", "eve")):
    A, B = torch.randn(2, 6, generator=torch.Generator().manual_seed(seed)), torch.eye(4, 2)
    updates.append(ClientUpdate(name, AdapterState({"q_proj": LoraFactors(A, B, scale=2.0)}), num_examples=10))
combined = aggregate(updates, "product_mean", target_rank=4)
mean = sum(update.state["q_proj"].dense() for update in updates) / 3
assert torch.allclose(combined.state["q_proj"].dense(), mean, atol=1e-5)
assert not combined.flagged
```
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from importlib import import_module
from numbers import Integral, Real
from typing import Any, get_args

import torch

from fedlora_hf.aggregation.cohort import Cohort, PastRound, client_weights
from fedlora_hf.aggregation.counts import WEIGHT_CAP, Counts, believed
from fedlora_hf.aggregation.coverage import check_alike, filled
from fedlora_hf.aggregation.device import chosen_device, free_memory, moved
from fedlora_hf.aggregation.screening import PartialModules, Screened, checked_server, screen
from fedlora_hf.aggregation.stacks import Stacks
from fedlora_hf.errors import ConfigError, UpdateError
from fedlora_hf.methods import method_named
from fedlora_hf.methods.method import Method
from fedlora_hf.methods.settings import method_options
from fedlora_hf.numerics.evidence import Evidence
from fedlora_hf.update import AdapterState, Aggregate, ClientUpdate
from fedlora_hf.util.say import say
from fedlora_hf.util.stopwatch import part


def aggregate(
    updates: Iterable[ClientUpdate],
    method: str = "clair",
    *,
    weight_by: str = "examples",
    weight_cap: float = WEIGHT_CAP,
    target_rank: int | None = None,
    reference: AdapterState | None = None,
    partial_modules: PartialModules = "quarantine",
    past: Sequence[PastRound] = (),
    functional: Mapping[str, Evidence] | None = None,
    server: AdapterState | None = None,
    device: str = "auto",
    **options: Any,
) -> Aggregate:
    """Combine clients' updates into one global adapter and, where the method refines, personalised ones.

    Pure and in memory (or from disk, when the states read themselves lazily); needs no Trainer and no model.

    updates: any order; the result does not depend on it, to the last bit. Unusable ones (unreadable, NaN, wrong modules
        or shapes, a name unfit as a folder) are quarantined with a reason and never touch a mean.
    method: a name in `fedlora_hf.methods.METHODS`. options: that method's own options.
    weight_by: "examples" (num_examples; uniform when any client does not tell it) or "uniform".
    weight_cap: a robust method counts no client for more than so many times the cohort's median number of examples,
        whatever it claims; at least 1. What was claimed is in `Aggregate.claimed_weights` and `outlier_claims`.
    target_rank: rank of the global adapter; default the largest among the clients (stacking: the sum of the ranks).
    reference: the adapter the clients started from this round, when there was one.
    partial_modules: "quarantine" clients that lack modules; aggregate the "common" ones alone, those that all sound
        clients have (`Aggregate.diagnosis` then lists what was left out); count what is missing as "zero", no change;
        or "refuse" (UpdateError). `coverage.costs` tells what each would cost.
    past: what earlier rounds found, oldest first; clair combines their evidence with this round's.
    functional: {client: evidence} of this round from other clients' losses, where it was taken; clair counts it too.
    server: an adapter trained on the server's own data from the same start; fltrust compares with it.
    device: where this is computed: "cpu", "cuda[:n]", or "auto", a CUDA device with room for the largest module.

    Raises ConfigError for a bad argument, UpdateError when no usable update is left or ids repeat.
    """
    chosen = method_named(method)
    settings = method_options(chosen, **options)
    _one_of("weight_by", weight_by, ("examples", "uniform"))
    _one_of("partial_modules", partial_modules, get_args(PartialModules))
    _check_numbers(weight_cap, target_rank)
    with torch.no_grad():
        with part("screen"):
            found = _screened(_listed(updates), reference, partial_modules)
        _check_enough(found, chosen)
        trusted = None if server is None else checked_server(server, found.usable[0], found.modules)
        counts = _counted(found.usable, chosen, weight_by, weight_cap)
        usable = tuple(replace(u, num_examples=counts.used.get(u.client_id, u.num_examples)) for u in found.usable)
        limits = dict.fromkeys(counts.outliers, weight_cap) if chosen.counts == "capped" else {}
        start = (target_rank, reference, tuple(past), functional or {}, limits, trusted)
        result = _worked(Cohort(usable, weight_by, found.modules, *start), chosen, settings, device)
    left_out = {"modules_left_out": list(found.left_out)} if found.left_out else {}
    return replace(
        result,
        quarantined=dict(sorted({**found.quarantined, **result.quarantined}.items())),
        diagnosis={**result.diagnosis, **left_out},
        claimed_weights=client_weights(found.usable, weight_by),
        outlier_claims=counts.outliers,
    )


def _worked(cohort: Cohort, method: Method, settings: Any, choice: str) -> Aggregate:
    """The method's result on the device that is chosen. Fixed projections are drawn on the CPU and clients are judged
    there, so flags are the same wherever it is."""
    place = chosen_device(choice, cohort.updates)
    try:
        return _worked_on(place, cohort, method, settings)
    except torch.OutOfMemoryError:
        if choice != "auto":
            raise
    say(f"aggregation: {place} has no room for it, so it is done on the CPU; aggregation_device=cpu begins there")
    return _worked_on(torch.device("cpu"), cohort, method, settings)


def _worked_on(place: torch.device, cohort: Cohort, method: Method, settings: Any) -> Aggregate:
    """The method's result on a device, brought to where the first client's factors are."""
    home = cohort.updates[0].state[cohort.modules[0]].A.device
    if place == home and place.type == "cpu":
        return rule_of(method)(cohort, settings)
    with closing(Stacks(cohort.updates, cohort.modules, place, free_memory(place))) as stacks:
        result = rule_of(method)(replace(cohort, device=place, stacks=stacks), settings)
    return replace(result, state=moved(result.state, home))


def _screened(
    updates: Sequence[ClientUpdate], reference: AdapterState | None, partial_modules: PartialModules
) -> Screened:
    """The updates that can be used; UpdateError where none is left, or none of the modules."""
    if partial_modules == "refuse":
        check_alike(updates)
    elif partial_modules == "zero":
        updates = filled(updates)
    found = screen(updates, reference, partial_modules)
    if not found.usable:
        reasons = "; ".join(f"{client}: {reason}" for client, reason in list(found.quarantined.items())[:3])
        raise UpdateError(f"0 usable updates: at least one is needed; check the clients ({reasons or 'none came'})")
    if not found.modules:
        raise UpdateError("0 modules that all clients have: at least one is needed; train the same target modules")
    return found


def _check_enough(found: Screened, method: Method) -> None:
    """UpdateError where screening leaves fewer clients than the method needs; it names those that were left out."""
    number, least = len(found.usable), method.least_clients
    if number < least:
        out = "; ".join(f"{client}: {reason}" for client, reason in list(found.quarantined.items())[:3])
        raise UpdateError(
            f"clients that can be used: {number}, and {method.name} needs at least {least}; use product_mean for fewer"
            + (f" (left out: {out})" if out else "")
        )


def _counted(updates: Sequence[ClientUpdate], method: Method, weight_by: str, cap: float) -> Counts:
    """What the clients' numbers of examples count for; nothing where they are not all told, or not asked for."""
    claims = {update.client_id: int(n) for update in updates if (n := update.num_examples) is not None}
    if weight_by == "uniform" or len(claims) < len(updates):
        return Counts({}, {})
    return believed(claims, cap, method.counts)


def rule_of(method: Method) -> Callable[[Cohort, Any], Aggregate]:
    """The method's rule: the function of its name in the file of its name here, unless it brings its own."""
    if method.rule is not None:
        return method.rule
    rule: Callable[[Cohort, Any], Aggregate] = getattr(import_module(f"{__name__}.{method.name}"), method.name)
    return rule


def _listed(updates: Any) -> list[ClientUpdate]:
    """The updates; UpdateError for what is none."""
    items = list(updates) if isinstance(updates, Iterable) and not isinstance(updates, str | Mapping) else [updates]
    for number, item in enumerate(items, 1):
        if not isinstance(item, ClientUpdate):
            raise UpdateError(
                f"updates: item {number} is a {type(item).__name__}; pass a list of ClientUpdate(client_id, state)"
            )
    return items


def _check_numbers(weight_cap: object, target_rank: object) -> None:
    if isinstance(weight_cap, bool) or not isinstance(weight_cap, Real) or not float(weight_cap) >= 1:
        raise ConfigError(f"weight_cap={weight_cap!r}: must be a number of at least 1; inf believes every claim")
    if target_rank is not None and (
        isinstance(target_rank, bool) or not isinstance(target_rank, Integral) or target_rank < 1
    ):
        raise ConfigError(
            f"target_rank={target_rank!r}: must be a whole number above 0; leave it out for the largest of all"
        )


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listing = " or ".join(repr(choice) for choice in choices)
        raise ConfigError(f"{name}={value!r}: must be {listing}; choose one of these")
