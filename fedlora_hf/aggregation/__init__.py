"""Aggregation: one method, one file, one pure function; `aggregate` is the door they share."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from fedlora_hf.aggregation import (
    bulyan,
    centred_clipping,
    clair,
    dare,
    dirmag_mean,
    fedavg,
    fedex,
    fedsa,
    ffa,
    fltrust,
    geometric_median,
    local,
    median,
    multikrum,
    norm_clipping,
    product_mean,
    rolora,
    stacking,
    ties,
    trimmed_mean,
)
from fedlora_hf.aggregation.cohort import Cohort, PastRound
from fedlora_hf.aggregation.method import Method
from fedlora_hf.aggregation.screening import PartialModules, checked_server, screen
from fedlora_hf.errors import ConfigError, UpdateError
from fedlora_hf.numerics.evidence import Evidence
from fedlora_hf.update import AdapterState, Aggregate, ClientUpdate

METHODS: dict[str, Method] = {
    "clair": clair.METHOD,
    "local": local.METHOD,
    "fedavg": fedavg.METHOD,
    "product_mean": product_mean.METHOD,
    "stacking": stacking.METHOD,
    "fedex": fedex.METHOD,
    "ffa": ffa.METHOD,
    "rolora": rolora.METHOD,
    "fedsa": fedsa.METHOD,
    "dirmag_mean": dirmag_mean.METHOD,
    "median": median.METHOD,
    "trimmed_mean": trimmed_mean.METHOD,
    "multikrum": multikrum.METHOD,
    "geometric_median": geometric_median.METHOD,
    "norm_clipping": norm_clipping.METHOD,
    "centred_clipping": centred_clipping.METHOD,
    "bulyan": bulyan.METHOD,
    "fltrust": fltrust.METHOD,
    "ties": ties.METHOD,
    "dare": dare.METHOD,
}


def method_named(name: str) -> Method:
    """The method of that name, or a ConfigError that lists the names there are."""
    if name not in METHODS:
        raise ConfigError(f"aggregation method {name!r}: must be one of {', '.join(METHODS)}; choose one of these")
    return METHODS[name]


def method_options(method: Method, **options: Any) -> Any:
    """The method's frozen options from keyword arguments; ConfigError for an unknown one, a wrong type or value."""
    known = [field.name for field in fields(method.options)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        listing = ", ".join(known) if known else "none"
        raise ConfigError(f"option {unknown[0]!r} of method {method.name!r}: its options are: {listing}; remove it")
    hints = get_type_hints(method.options)
    for name, value in options.items():
        if not _fits(value, hints[name]):
            kind = getattr(hints[name], "__name__", str(hints[name]))
            raise ConfigError(f"{name}={value!r}: must be of type {kind} (method {method.name!r}); change the value")
    return method.options(**options)


def aggregate(
    updates: Iterable[ClientUpdate],
    method: str = "clair",
    *,
    weight_by: str = "examples",
    target_rank: int | None = None,
    reference: AdapterState | None = None,
    partial_modules: PartialModules = "quarantine",
    past: Sequence[PastRound] = (),
    functional: Mapping[str, Evidence] | None = None,
    server: AdapterState | None = None,
    **options: Any,
) -> Aggregate:
    """Combine clients' updates into one global adapter and, where the method refines, personalised ones.

    Pure and in memory (or from disk, when the states read themselves lazily); needs no Trainer and no model.

    updates: any order; the result does not depend on it, to the last bit. Unusable ones (unreadable, NaN, wrong modules
        or shapes, a name unfit as a folder) are quarantined with a reason and never touch a mean.
    method: a name in METHODS. options: that method's own options.
    weight_by: "examples" (num_examples; uniform when any client does not tell it) or "uniform".
    target_rank: rank of the global adapter; default the largest among the clients (stacking: the sum of the ranks).
    reference: the adapter the clients started from this round, when there was one.
    partial_modules: "quarantine" clients that lack modules, or aggregate the "common" ones alone, those that all sound
        clients have; `Aggregate.diagnosis` then lists what was left out.
    past: what earlier rounds found, oldest first; clair combines their evidence with this round's.
    functional: {client: evidence} of this round from other clients' losses, where it was taken; clair counts it too.
    server: an adapter trained on the server's own data from the same start; fltrust compares with it.

    Raises ConfigError for a bad argument, UpdateError when no usable update is left or ids repeat.
    """
    chosen = method_named(method)
    settings = method_options(chosen, **options)
    _one_of("weight_by", weight_by, ("examples", "uniform"))
    _one_of("partial_modules", partial_modules, get_args(PartialModules))
    if target_rank is not None and (not _fits(target_rank, int) or target_rank < 1):
        raise ConfigError(
            f"target_rank={target_rank!r}: must be a whole number above 0; leave it out for the largest of all"
        )
    with torch.no_grad():
        found = screen(updates, reference, partial_modules)
        if not found.usable:
            reasons = "; ".join(f"{client}: {reason}" for client, reason in list(found.quarantined.items())[:3])
            raise UpdateError(f"0 usable updates: at least one is needed; check the clients ({reasons or 'none came'})")
        if not found.modules:
            raise UpdateError("0 modules that all clients have: at least one is needed; train the same target modules")
        trusted = None if server is None else checked_server(server, found.usable[0], found.modules)
        cohort = Cohort(
            found.usable,
            weight_by,
            found.modules,
            target_rank,
            reference,
            tuple(past),
            functional or {},
            server=trusted,
        )
        result = chosen.rule(cohort, settings)
    left_out = {"modules_left_out": list(found.left_out)} if found.left_out else {}
    quarantined = dict(sorted({**found.quarantined, **result.quarantined}.items()))
    return replace(result, quarantined=quarantined, diagnosis={**result.diagnosis, **left_out})


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listing = " or ".join(repr(choice) for choice in choices)
        raise ConfigError(f"{name}={value!r}: must be {listing}; choose one of these")


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of an option's declared type: a class, a Literal, or a union of these."""
    origin = get_origin(hint)
    if origin is Literal:
        return value in get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if isinstance(value, bool):  # True is an int to Python, never a count to a user
        return hint is bool
    return isinstance(value, {int: Integral, float: Real}.get(hint, hint))
