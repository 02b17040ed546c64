"""The names of a run's groups of clients, for readers of a record that have no use for tensors."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping

from fedlora_hf.methods.clair import FIRST
from fedlora_hf.record.record import RunRecord


def group_names(record: RunRecord) -> list[str]:
    """The groups besides the first one after the last round, in order; [] where there is one group alone."""
    told = record.rounds[-1].get("groups") if record.rounds else None
    names = [name for name in told if name.isdecimal() and name != FIRST] if isinstance(told, Mapping) else []
    return sorted(names, key=int)
