"""Aggregation rules of Flower and byzfl, called as the libraries ship them on the clients' factors as vectors.

Both extras are optional (`pip install fedlora_hf[bench]`); a library that is not there gives no rules. The rules are
told how many clients are contaminated, which CLAIR is not.
"""
# SPDX-License-Identifier: Apache-2.0

import logging
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from scripts.experiments.vectors import Vector


class Chosen(NamedTuple):
    """The aggregate (d,), and the indices of the clients it was made of; None where the rule selects nobody."""

    vector: Vector
    clients: list[int] | None = None


# (the clients' vectors (K, d), the common start (d,), how many are contaminated) -> Chosen
Rule = Callable[[Vector, Vector, int], Chosen]


def rules() -> dict[str, Rule]:
    """{name: rule} of the libraries that are installed."""
    found: dict[str, Rule] = {}
    if find_spec("flwr"):
        found |= _flower()
    if find_spec("byzfl"):
        found |= _byzfl()
    return found


class _Reply(NamedTuple):
    """As much of Flower's Message as its strategies read; a real one can be made within a running app alone."""

    content: Any

    def has_error(self) -> bool:
        return False


def _flower() -> dict[str, Rule]:
    from flwr.serverapp import strategy

    logging.getLogger("flwr").setLevel(logging.ERROR)

    def rule(make: Callable[[int, int], Any], selects: bool = False) -> Rule:
        """The rule of `make`(contaminated, clients), a Flower strategy."""
        return lambda vectors, start, bad: by_strategy(make(bad, len(vectors)), vectors, selects)

    who = {"train_metrics_aggr_fn": _who}
    return {
        "flower Krum": rule(lambda bad, K: strategy.Krum(num_malicious_nodes=bad, **who), True),
        "flower MultiKrum": rule(
            lambda bad, K: strategy.MultiKrum(num_malicious_nodes=bad, num_nodes_to_select=K - bad, **who), True
        ),
        # It refuses fewer than 4 f + 3 clients, so f is the most it takes where more are contaminated.
        "flower Bulyan": rule(lambda bad, K: strategy.Bulyan(num_malicious_nodes=min(bad, (K - 3) // 4), **who), True),
        "flower FedMedian": rule(lambda bad, K: strategy.FedMedian(**who)),
        "flower FedTrimmedAvg": rule(lambda bad, K: strategy.FedTrimmedAvg(beta=_share(bad, K), **who)),
    }


def _share(bad: int, K: int) -> float:
    """The share to trim at each end for `bad` contaminated clients: int(share * K) must be `bad` again."""
    return (bad + 0.5) / K if bad else 0.0


def by_strategy(strategy: Any, vectors: Vector, selects: bool) -> Chosen:
    from flwr.app import ArrayRecord, MetricRecord, RecordDict

    replies = []
    for client, vector in enumerate(vectors):
        metrics = MetricRecord({"num-examples": 1, "client": client})
        replies.append(_Reply(RecordDict({"arrays": ArrayRecord([vector]), "metrics": metrics})))
    arrays, metrics = strategy.aggregate_train(1, replies)
    return Chosen(arrays.to_numpy_ndarrays()[0], list(metrics["clients"]) if selects else None)


def _who(contents: list[Any], key: str) -> Any:
    """The clients whose contents a strategy goes on with, in place of the mean of their metrics."""
    from flwr.app import MetricRecord

    return MetricRecord({"clients": [content["metrics"]["client"] for content in contents]})


def _byzfl() -> dict[str, Rule]:
    # byzfl itself imports torchvision for its benchmark; its aggregators need nothing of that.
    if "byzfl" not in sys.modules:
        package, spec = ModuleType("byzfl"), find_spec("byzfl")
        package.__spec__ = spec
        package.__path__ = list(spec.submodule_search_locations or ()) if spec else []
        sys.modules["byzfl"] = package
    from byzfl import aggregators

    def rule(make: Callable[[Vector, int], Callable[[Vector], Vector]]) -> Rule:
        """The rule of `make`(changes, contaminated), on what every client changed: byzfl's are made for gradients."""

        def combine(vectors: Vector, start: Vector, bad: int) -> Chosen:
            changes = vectors - start
            return Chosen(start + make(changes, bad)(changes))

        return combine

    def nearest_then_trimmed(changes: Vector, bad: int) -> Callable[[Vector], Vector]:
        return lambda vectors: aggregators.TrMean(bad)(aggregators.NNM(bad)(vectors))

    return {
        "byzfl MultiKrum": rule(lambda changes, bad: aggregators.MultiKrum(bad)),
        "byzfl NNM + TrMean": rule(nearest_then_trimmed),
        "byzfl GeometricMedian": rule(lambda changes, bad: aggregators.GeometricMedian()),
        # The radius within which it trusts a client: the median norm, as its default (100) would clip nobody here.
        "byzfl CenteredClipping": rule(
            lambda changes, bad: aggregators.CenteredClipping(
                L=3, tau=float(np.median(np.linalg.norm(changes, axis=1)))
            )
        ),
    }
