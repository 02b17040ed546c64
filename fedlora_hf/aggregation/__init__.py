"""Aggregation: one method, one file, one pure function; `aggregate` is the door they share."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from fedlora_hf.aggregation import fedavg
from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.door import screen
from fedlora_hf.aggregation.method import Method
from fedlora_hf.errors import ConfigError, UpdateError
from fedlora_hf.update import AdapterState, Aggregate, ClientUpdate

METHODS: dict[str, Method] = {
    "fedavg": fedavg.METHOD,
}


def method_named(name: str) -> Method:
    """The method of that name, or a ConfigError that lists the names there are."""
    if name not in METHODS:
        raise ConfigError(f"aggregation method {name!r}: must be one of {', '.join(METHODS)}; choose one of these")
    return METHODS[name]


def method_options(method: Method, **options: Any) -> Any:
    """The method's frozen options from keyword arguments; an unknown one is a ConfigError that lists the known ones."""
    known = [field.name for field in fields(method.options)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        listing = ", ".join(known) if known else "none"
        raise ConfigError(f"option {unknown[0]!r} of method {method.name!r}: its options are: {listing}; remove it")
    return method.options(**options)


def aggregate(
    updates: Iterable[ClientUpdate],
    method: str = "clair",
    *,
    weight_by: str = "examples",
    target_rank: int | None = None,
    reference: AdapterState | None = None,
    **options: Any,
) -> Aggregate:
    """Combine clients' updates into one global adapter and, where the method refines, personalised ones.

    Pure and in memory (or from disk, when the states read themselves lazily); needs no Trainer and no model.

    updates: any order; the result does not depend on it, to the last bit. Unusable ones (NaN, wrong modules or
        shapes) are quarantined with a reason and never touch a mean.
    method: a name in METHODS. options: that method's own options.
    weight_by: "examples" (num_examples; uniform when no client tells it) or "uniform".
    target_rank: rank of the global adapter; default the largest among the clients.
    reference: the adapter the clients started from this round, when there was one.

    Raises ConfigError for a bad argument, UpdateError when no usable update is left or ids repeat.
    """
    chosen = method_named(method)
    settings = method_options(chosen, **options)
    if target_rank is not None and target_rank < 1:
        raise ConfigError(f"target_rank={target_rank}: must be at least 1; leave it out for the clients' largest rank")
    usable, quarantined = screen(updates, reference)
    if not usable:
        reasons = "; ".join(f"{client}: {reason}" for client, reason in sorted(quarantined.items())[:3])
        raise UpdateError(f"0 usable updates: at least one is needed; check the clients ({reasons or 'none came'})")
    cohort = Cohort(usable, client_weights(usable, weight_by), tuple(usable[0].state), target_rank, reference)
    return replace(chosen.rule(cohort, settings), quarantined=quarantined)


def client_weights(updates: Iterable[ClientUpdate], weight_by: str) -> dict[str, float]:
    """{client id: share of the mean}, summing to 1: by number of examples where every client tells it, or uniform."""
    updates = list(updates)
    if weight_by not in ("examples", "uniform"):
        raise ConfigError(f"weight_by={weight_by!r}: must be 'examples' or 'uniform'; choose one of these")
    counts = [update.num_examples for update in updates]
    if weight_by == "uniform" or None in counts:
        return {update.client_id: 1 / len(updates) for update in updates}
    total = sum(count for count in counts if count is not None)
    return {update.client_id: (update.num_examples or 0) / total for update in updates}
