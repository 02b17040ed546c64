"""rolora: clients train B in odd rounds and A in even ones, the other factor frozen and common, so means are exact."""
# SPDX-License-Identifier: Apache-2.0

from fedlora_hf.aggregation import ffa
from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.methods.method import NoOptions
from fedlora_hf.update import Aggregate


def rolora(cohort: Cohort, options: NoOptions) -> Aggregate:
    """The common factor as it is, to the last bit, and sum_k p_k of the other one.

    Which factor is common is read from the updates: the one that more clients share (B was trained where both are, as
    in a first round). Clients that have another are quarantined; UpdateError where no two have a factor in common.
    """
    strangers = {factor: ffa.other_factors(cohort, factor) for factor in ("A", "B")}
    common = min(strangers, key=lambda factor: len(strangers[factor]))
    return ffa.mean_of_other(cohort, common, "rolora")
