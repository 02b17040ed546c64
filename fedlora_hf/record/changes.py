"""How far clients and the global adapter moved in a round, and how alike the clients' changes are."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from fedlora_hf.numerics import direction, lowrank
from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors

MAX_SIMILARITY = 256  # clients; a larger cohort's cosines are not recorded


def component_changes(start: AdapterState, end: AdapterState) -> dict[str, float]:
    """How far the global adapter moved, {"A.direction", "A.magnitude", "B.direction", "B.magnitude"}: means over rows
    and modules of 1 - cos and of |change of the norm|. {} where the ranks differ (stacking)."""
    moved: dict[str, list[float]] = {}
    for module, after in end.items():
        before, after = start[module], after.rescaled(start[module].scale)
        if before.rank != after.rank:
            return {}
        for factor in ("A", "B"):
            turn, stretch = direction.component_change(getattr(before, factor), getattr(after, factor), "row")
            moved.setdefault(f"{factor}.direction", []).append(turn)
            moved.setdefault(f"{factor}.magnitude", []).append(stretch)
    return {part: sum(values) / len(values) for part, values in moved.items()}


def compared(
    updates: Sequence[ClientUpdate],
    start: AdapterState | None,
    modules: Iterable[str],
    starts: Mapping[str, AdapterState] | None = None,
) -> tuple[dict[str, float], dict[str, Any]]:
    """({client: norm of its change}, cosines between the changes as the record has them: {} above MAX_SIMILARITY), the
    modules together. starts: {client: what it started from} where that is not `start`."""
    ids, begun = [u.client_id for u in updates], starts or {}
    if not 1 < len(updates) <= MAX_SIMILARITY:
        return {u.client_id: change_norm(u, begun.get(u.client_id, start), modules) for u in updates}, {}
    products = sum_of_products(updates, start, modules, begun)
    norm = products.diagonal().clamp_min(0).sqrt()
    unit = norm.clamp_min(1e-150)
    cosine = products / (unit[:, None] * unit)
    rounded = [[round(v, 4) for v in row] for row in cosine.tolist()]
    return dict(zip(ids, norm.tolist(), strict=True)), {"ids": ids, "cosine": rounded}


def sum_of_products(
    updates: Sequence[ClientUpdate],
    start: AdapterState | None,
    modules: Iterable[str],
    starts: Mapping[str, AdapterState] | None = None,
) -> torch.Tensor:
    """(K, K) inner products of the changes W_k - W_start, from those of the W themselves, which have half the rank."""
    K = len(updates)
    total = torch.zeros(K, K, dtype=torch.float64)
    begun = [(starts or {}).get(u.client_id, start) for u in updates]
    several = list({id(state): state for state in begun if state is not None}.values())
    place = [K + next((i for i, state in enumerate(several) if state is own), 0) for own in begun]
    for module in modules:
        pairs = [u.state[module].pair() for u in updates]
        if start is None:
            total += lowrank.inner_products(pairs).cpu()
            continue
        G = lowrank.inner_products([*pairs, *(state[module].pair() for state in several)]).cpu()
        total += G[:K, :K] - G[:K, place] - G[place, :K] + G[place][:, place]
    return total


def change_norm(update: ClientUpdate, start: AdapterState | None, modules: Iterable[str]) -> float:
    """Frobenius norm of a client's change, the modules together."""
    return sum(change(update, start, module).norm() ** 2 for module in modules) ** 0.5


def change(update: ClientUpdate, start: AdapterState | None, module: str) -> LoraFactors:
    """What a client changed in one module since the round's start."""
    return update.state[module] if start is None else update.state[module] - start[module]
