"""What has been scored in a run: no adapter is scored on a client's split twice."""
# SPDX-License-Identifier: Apache-2.0

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora_hf.update import AdapterState

Metrics = dict[str, float]
# Entries that are kept, the oldest going first: 50 MB at most.
KEPT = 100_000


@dataclass(frozen=True, eq=False)
class _Known:
    """about: the very objects that the metrics are of (data, a function), which a user may replace between calls."""

    metrics: Metrics
    about: tuple[object, ...]


class Scores:
    """Metrics by (adapter, client, split). taken: scorings that were done; reused: that were known already."""

    def __init__(self) -> None:
        self.taken = self.reused = 0
        self._known: OrderedDict[tuple[str, str, str], _Known] = OrderedDict()
        self._last: tuple[AdapterState, str] | None = None

    def fingerprint(self, state: AdapterState) -> str:
        """`fingerprint_of` a state, worked out once for one that comes again and again."""
        if self._last is None or self._last[0] is not state:
            self._last = (state, fingerprint_of(state))
        return self._last[1]

    def known(self, adapter: str, client: str, split: str, about: Sequence[object] = ()) -> Metrics | None:
        """The metrics of an adapter (its fingerprint) on a client's split, where they are known; that is counted."""
        entry = self._known.get((adapter, client, split))
        if entry is None or len(entry.about) != len(about):
            return None
        if not all(one is other for one, other in zip(entry.about, about, strict=True)):
            return None
        self.reused += 1
        return dict(entry.metrics)

    def note(self, adapter: str, client: str, split: str, metrics: Metrics, about: Sequence[object] = ()) -> None:
        """Remember metrics, taken here or in another process."""
        self._known[adapter, client, split] = _Known(dict(metrics), tuple(about))
        if len(self._known) > KEPT:
            self._known.popitem(last=False)

    def once(
        self, state: AdapterState, client: str, split: str, measure: Callable[[], Metrics], about: Sequence[object] = ()
    ) -> Metrics:
        """The metrics of an adapter on a client's split: known, or what `measure` gives, which is counted."""
        adapter = self.fingerprint(state)
        found = self.known(adapter, client, split, about)
        if found is None:
            found = measure()
            self.taken += 1
            self.note(adapter, client, split, found, about)
        return found


def fingerprint_of(state: AdapterState) -> str:
    """SHA-256 of everything an adapter does to a model: modules, scales, factors and extras, to the bit."""
    digest = hashlib.sha256()

    def add(name: str, tensor: Tensor) -> None:
        whole = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}\n".encode())
        digest.update(whole.reshape(-1).view(torch.uint8).numpy().data)

    for module, factors in state.items():
        digest.update(f"{module} {factors.scale!r}\n".encode())
        add("A", factors.A)
        add("B", factors.B)
    for name in sorted(state.extras):
        add(name, state.extras[name])
    return digest.hexdigest()
