"""multikrum: the mean of the clients whose updates W_k lie closest to their neighbours'."""
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.method import Method
from fedlora_hf.aggregation.shared import gram, weighted_products
from fedlora_hf.errors import ConfigError
from fedlora_hf.numerics import means
from fedlora_hf.update import Aggregate


@dataclass(frozen=True)
class MultiKrumOptions:
    """num_contaminated: f, how many clients may be contaminated; default the most theory allows, floor((K - 3) / 2).
    num_selected: how many clients are averaged; default K - f. normalise: compare directions only, every update at
    unit norm; a boosted client then passes with its size, so leave it off where clients may boost.
    """

    num_contaminated: int | None = None
    num_selected: int | None = None
    normalise: bool = False

    def __post_init__(self) -> None:
        if self.num_contaminated is not None and self.num_contaminated < 0:
            raise ConfigError(f"num_contaminated={self.num_contaminated}: must be at least 0; leave it out for most")
        if self.num_selected is not None and self.num_selected < 1:
            raise ConfigError(f"num_selected={self.num_selected}: must be at least 1; leave it out for K - f")


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


METHOD = Method(
    name="multikrum",
    title="Multi-Krum on the products",
    paper="Blanchard et al. 2017 (arXiv 1703.02757), on products",
    averages="product",
    rule=multikrum,
    options=MultiKrumOptions,
    robust=True,
)
