"""fltrust: clients are weighed by the cosine of their change with that of the server's own training."""
# SPDX-License-Identifier: Apache-2.0

from fedlora_hf.aggregation import changes
from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.errors import ConfigError, RoundError
from fedlora_hf.methods.method import NoOptions
from fedlora_hf.numerics import clipping
from fedlora_hf.update import Aggregate


def fltrust(cohort: Cohort, options: NoOptions) -> Aggregate:
    """W_0 + sum_k t_k (||D_s|| / ||D_k||) D_k / sum_k t_k with trust t_k = max(0, cos(D_k, D_s)).

    D_k is a client's change from the round's start, D_s the server's, to whose length every change is brought.
    Numbers of examples do not count, as in the paper. A client of trust 0 is left out and not flagged: the server's few
    examples may be what differs.
    ConfigError without the server's update, RoundError when nobody is trusted.
    """
    if cohort.server is None:
        raise ConfigError(
            "fltrust needs an update trained on the server's own data: pass --server_dataset (aggregate: server=...), "
            "or choose multikrum"
        )
    products = changes.gram(cohort, (cohort.server,))
    lengths = clipping.norms(products)
    cosines = products[:-1, -1] / (lengths[:-1] * lengths[-1]).clamp_min(1e-300)
    trust = cosines.clamp(0, 1)
    total = float(trust.sum())
    if not total:
        raise RoundError(
            "fltrust: no client's change has a positive cosine with the server's; nothing was changed; look at the "
            "server's data, or choose multikrum"
        )
    shares = trust / total
    coefficients = shares * lengths[-1] / lengths[:-1].clamp_min(1e-300)
    state, modules = changes.moved(cohort, dict(zip(cohort.ids, coefficients.tolist(), strict=True)))
    diagnosis = {
        "cosines": dict(zip(cohort.ids, cosines.tolist(), strict=True)),
        "server_norm": float(lengths[-1]),
    }
    weights = dict(zip(cohort.ids, shares.tolist(), strict=True))
    return Aggregate(state, weights=weights, modules=modules, diagnosis=diagnosis)
