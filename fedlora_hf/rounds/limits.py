"""Limits of a round: a cohort too small for the method, too many suspects, too much privacy spent. Nothing is changed.

The last two end a run before anything is committed: `StoppedError`, which has an exit code of its own, 3.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fedlora_hf.errors import ConfigError, StoppedError
from fedlora_hf.methods.method import Method
from fedlora_hf.privacy import DELTA, account, epsilon
from fedlora_hf.util.counts import suspects_allowed

if TYPE_CHECKING:
    from fedlora_hf.config import FederatedConfig


def check_suspects(
    limit: str | int | float | None,
    number: int,
    cohort: Sequence[str],
    flagged: Iterable[str],
    quarantined: Iterable[str],
) -> None:
    """StoppedError when more of a round's clients are flagged or quarantined than the limit allows."""
    allowed = suspects_allowed(limit, len(cohort))
    suspects = sorted({*flagged, *quarantined} & {*cohort})
    if allowed is None or len(suspects) <= allowed:
        return
    names = ", ".join(suspects[:5]) + (", ..." if len(suspects) > 5 else "")
    raise StoppedError(
        f"round {number}: {len(suspects)} of {len(cohort)} clients flagged or quarantined ({names}), max_suspects="
        f"{limit} allows {allowed}; nothing was changed; look at these clients, then --resume_from last goes on, "
        "without them or with a higher --max_suspects"
    )


def check_budget(options: Any, number: int, rounds: Sequence[dict[str, Any]], cohort: Sequence[str]) -> None:
    """StoppedError when a round with this cohort would take a client past `dp_max_epsilon`.

    rounds: the record's entries so far.
    """
    limit = options.dp_max_epsilon
    if limit is None:
        return
    counted = {"dp_clip": options.dp_clip, "dp_noise_multiplier": options.dp_noise_multiplier or 0.0}
    most = account(counted, [*rounds, {"cohort": list(cohort)}])["rounds"]
    delta = DELTA if options.dp_delta is None else options.dp_delta
    spent = epsilon(options.dp_noise_multiplier or 0.0, most, delta)
    if spent > limit:
        raise StoppedError(
            f"round {number}: a client that takes part in {most} rounds has epsilon {spent:.4g} at delta {delta:g}, "
            f"dp_max_epsilon={limit:g}; nothing was changed; stop here, or begin again with more noise or fewer rounds"
        )


def check_cohort(args: "FederatedConfig", method: Method, clients: int) -> None:
    """Refuse a cohort that is too small for the method, and a server without the data that the method needs."""
    if method.needs_server and args.server_dataset is None:
        raise ConfigError(
            f"aggregation={method.name!r} without server_dataset: it compares clients with an update trained on the "
            "server's own data; pass --server_dataset, or choose multikrum"
        )
    size = min(clients, args.clients_per_round or clients)
    if size < method.least_clients:
        raise ConfigError(
            f"{size} clients a round: {method.name} needs at least {method.least_clients}; add clients or choose "
            "--aggregation product_mean"
        )
