"""The global adapters of several groups on disk: GROUPS/<name>/ beside the first group's, each a stock PEFT folder."""
# SPDX-License-Identifier: Apache-2.0

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora_hf.adapter.files import read_adapter, write_adapter
from fedlora_hf.methods.clair import FIRST
from fedlora_hf.update import AdapterState
from fedlora_hf.util.disk import remove_tree

GROUPS = "groups"


def write_groups(folder: str | os.PathLike[str], states: Mapping[str, AdapterState], config: Mapping[str, Any]) -> None:
    """Write every group's adapter but the first one's, in the place of those that are there; nothing for one group."""
    place = Path(folder) / GROUPS
    draft = place.with_name(f".{GROUPS}.tmp")
    remove_tree(draft)
    others = {name: state for name, state in states.items() if name != FIRST}
    for name, state in others.items():
        write_adapter(draft / name, state, config)
    remove_tree(place)
    if others:
        os.rename(draft, place)


def read_groups(folder: str | os.PathLike[str]) -> dict[str, AdapterState]:
    """{name: its adapter} of the groups that lie in `folder`, read lazily, in order."""
    place = Path(folder) / GROUPS
    if not place.is_dir() or place.is_symlink():
        return {}
    names = [path.name for path in place.iterdir() if path.name.isdecimal() and not path.is_symlink()]
    return {name: read_adapter(place / name)[0] for name in sorted(names, key=int)}
