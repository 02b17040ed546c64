"""An aggregate cut to the ranks that the modules have in the model, where these differ (a rank_pattern)."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping
from dataclasses import replace

from fedlora_hf.update import Aggregate, fitted


def cut_to(combined: Aggregate, ranks: Mapping[str, int]) -> Aggregate:
    """The aggregate with each module cut to the rank it has in the model, and that said of it."""
    state, modules = fitted(combined.state, ranks), dict(combined.modules)
    for module, facts in modules.items():
        before, after = combined.state[module], state[module]
        if after.rank < before.rank:
            lost, kept = (before - after).norm() ** 2, facts.get("discarded_energy", 0.0)
            share = lost / (before.norm() ** 2 or 1.0)
            modules[module] = {**facts, "rank": after.rank, "discarded_energy": kept + (1 - kept) * share}
    return replace(combined, state=state, modules=modules)
