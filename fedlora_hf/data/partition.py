"""Which client holds which record: pure functions of labels and a seed, from numpy alone.

Each returns {client id: sorted indices}; every index occurs exactly once, and the ids are fit client ids, in order.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedlora_hf.errors import DataError
from fedlora_hf.util.names import fit_ids
from fedlora_hf.util.seeding import derive_seed

Partition = dict[str, NDArray[np.int64]]
MAX_DRAWS = 100


def by_column(values: Sequence[str], column: str = "client") -> Partition:
    """One client for each distinct value, which must not be empty; its id is the nearest fit name."""
    if "" in values:
        raise DataError(
            f"column {column!r}: record {list(values).index('') + 1} has no value, and every record must name its "
            "client; complete it, or partition by iid"
        )
    distinct, inverse = np.unique(np.asarray(values, dtype=object), return_inverse=True)
    ids = fit_ids(distinct)
    parts = {ids[str(value)]: np.flatnonzero(inverse == position) for position, value in enumerate(distinct)}
    return dict(sorted(parts.items()))


def by_group(groups: Sequence[str]) -> Partition:
    """One client for each group: Dolly's category, or the Natural Instructions task."""
    return by_column(groups, "group")


def iid(num_examples: int, num_clients: int, seed: int, minimum: int = 1) -> Partition:
    """A random deal: sizes differ by one at most. DataError when a client would get fewer than `minimum`."""
    _check_count(num_examples, num_clients, minimum)
    order = np.random.default_rng(derive_seed(seed, "iid")).permutation(num_examples)
    return _numbered(np.array_split(order, num_clients))


def dirichlet(labels: Sequence[str | int], num_clients: int, alpha: float, seed: int, minimum: int = 1) -> Partition:
    """Label-skewed clients: each label's records are dealt by shares drawn from a symmetric Dirichlet(alpha).

    Small alpha gives clients of few labels, large alpha approaches iid (Yurochkin et al. 2019, "Bayesian
    Nonparametric Federated Learning of Neural Networks", section 4). All shares are drawn again, at most MAX_DRAWS
    times in all, until every client holds at least `minimum` records; DataError when none of the draws does.
    """
    _check_count(len(labels), num_clients, minimum)
    if not alpha > 0:
        raise DataError(f"dirichlet_alpha {alpha}: must be greater than 0; 0.5 is usual")
    places = [np.flatnonzero(np.asarray(labels) == label) for label in np.unique(np.asarray(labels))]
    for draw in range(MAX_DRAWS):
        rng = np.random.default_rng(derive_seed(seed, "dirichlet", draw))
        parts = _deal(places, num_clients, alpha, rng)
        if min(map(len, parts)) >= minimum:
            return _numbered(parts)
    raise DataError(
        f"dirichlet_alpha {alpha} with {num_clients} clients: {MAX_DRAWS} draws left some client with fewer than "
        f"{minimum} of the {len(labels)} records; raise alpha or lower num_clients"
    )


def _deal(
    places: list[NDArray[np.int64]], num_clients: int, alpha: float, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    hands: list[list[NDArray[np.int64]]] = [[] for _ in range(num_clients)]
    for indices in places:
        shares = rng.dirichlet(np.full(num_clients, alpha))
        # The last cut is left out: the last client takes the rest, so rounding loses no record.
        cuts = np.round(np.cumsum(shares)[:-1] * len(indices)).astype(int)
        for hand, part in zip(hands, np.split(rng.permutation(indices), cuts), strict=True):
            hand.append(part)
    return [np.concatenate(hand) for hand in hands]


def _check_count(num_examples: int, num_clients: int, minimum: int) -> None:
    if num_clients < 1 or num_examples < num_clients * minimum:
        raise DataError(
            f"num_clients {num_clients}: must be 1 to {num_examples // max(minimum, 1)}, for each to hold at least "
            f"{minimum} of the {num_examples} records; change num_clients"
        )


def _numbered(parts: list[NDArray[np.int64]]) -> Partition:
    width = max(2, len(str(len(parts) - 1)))
    return {f"client-{number:0{width}d}": np.sort(part) for number, part in enumerate(parts)}
