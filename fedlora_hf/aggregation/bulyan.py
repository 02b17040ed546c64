"""bulyan: Krum chooses clients one by one, then each entry is the mean of the values nearest their median."""
# SPDX-License-Identifier: Apache-2.0

from functools import partial

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.shared import coordinatewise, gram
from fedlora_hf.methods.robust import BulyanOptions
from fedlora_hf.numerics import means
from fedlora_hf.update import Aggregate


def bulyan(cohort: Cohort, options: BulyanOptions) -> Aggregate:
    """Of K clients theta = K - 2 f are chosen by repeated Krum; W[i, j] is the mean of the theta - 2 f of their values
    nearest to the median of them.

    Products are compared, not factors. Every client counts once, whatever number of examples it claims, as in the
    paper; who is not chosen has weight 0 and is not flagged: it was outranked, not judged. f is capped at what K
    allows (K >= 4 f + 3), since quarantine may have made the cohort smaller than planned.
    """
    K = len(cohort.ids)
    most = max((K - 3) // 4, 0)
    f = most if options.num_contaminated is None else min(options.num_contaminated, most)
    chosen = means.krum_selection(means.squared_distances(gram(cohort)), f, K - 2 * f)
    names = sorted(cohort.ids[k] for k in chosen)
    statistic = partial(means.mean_near_median, count=K - 4 * f)
    state, modules = coordinatewise(cohort.subset(names), statistic)
    weights = {client: 1 / len(names) if client in names else 0.0 for client in cohort.ids}
    diagnosis = {"num_contaminated": f, "num_selected": len(names)}
    return Aggregate(state, weights=weights, modules=modules, diagnosis=diagnosis)
