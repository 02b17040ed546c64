"""multikrum: the mean of the clients whose updates W_k lie closest to their neighbours'."""
# SPDX-License-Identifier: Apache-2.0

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.shared import gram, weighted_products
from fedlora_hf.methods.robust import MultiKrumOptions
from fedlora_hf.numerics import means
from fedlora_hf.update import Aggregate


def multikrum(cohort: Cohort, options: MultiKrumOptions) -> Aggregate:
    """Weighted mean of the `num_selected` clients of lowest Krum score, weights by examples among them [our choice;
    the paper's mean is uniform: `weight_by="uniform"`].

    Scores are squared distances of whole updates (all modules), from inner products of the factors: what a client's
    factors look like does not matter, only their product. A client not selected has weight 0; it is not *flagged*,
    because it was outranked, not judged: on a clean cohort too this rule leaves clients out. Numbers above what K
    allows are capped, since quarantine may have made the cohort smaller than planned.
    """
    K = len(cohort.ids)
    most = max((K - 3) // 2, 0)
    f = most if options.num_contaminated is None else min(options.num_contaminated, most)
    selected = K - f if options.num_selected is None else min(options.num_selected, K)
    products = gram(cohort)
    if options.normalise:
        products = means.normalised(products)
    scores = means.krum_scores(means.squared_distances(products), f)
    order = scores.argsort(stable=True)[:selected].tolist()  # equal scores: the lower id first
    chosen = cohort.subset([cohort.ids[k] for k in order])
    weights = dict.fromkeys(cohort.ids, 0.0) | dict(chosen.weights)
    state, modules = weighted_products(cohort, weights)
    diagnosis = {
        "num_contaminated": f,
        "num_selected": selected,
        "krum_scores": dict(zip(cohort.ids, scores.tolist(), strict=True)),
    }
    return Aggregate(state, weights=weights, modules=modules, diagnosis=diagnosis)
