"""The validity map's cohorts, put together from trained clients and their contaminated twins, and what CLAIR finds."""
# SPDX-License-Identifier: Apache-2.0

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import torch

from fedlora_hf.aggregation import aggregate
from fedlora_hf.errors import ConvergenceWarning
from fedlora_hf.rounds.store import RoundStore
from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors
from fedlora_hf.util.seeding import derive_seed
from scripts.experiments.map_clients import (
    SHARES,
    Setting,
    contaminated_pool,
    count_bad,
    is_complete,
    run_folder,
    variant,
)

Row = dict[str, str | int | float]
UPDATE_KINDS = ("sign flip", "Gaussian")
EVIDENCE = ("direction", "subspace", "scale")


def trained(folder: Path) -> dict[str, ClientUpdate]:
    """{id: update} of everything in a store's open round, in memory."""
    store = RoundStore(folder / "rounds", {})
    places = sorted((folder / "rounds" / ".open-1" / "clients").glob("[!.]*/update.json"))
    found = [store.update(1, place.parent.name) for place in places]
    return {
        update.client_id: ClientUpdate(update.client_id, update.state.in_memory(), update.num_examples)
        for update in found
    }


def sound(updates: Mapping[str, ClientUpdate], kinds: Iterable[str]) -> list[str]:
    """Ids of the clients themselves, without their contaminated twins."""
    return [client for client in updates if client.rpartition(".")[2] not in set(kinds)]


def sign_flip(state: AdapterState, seed: int) -> AdapterState:
    """The negative of what was learned (round one: the start is zero). A head keeps its sign: no evidence reads it."""
    return AdapterState({module: LoraFactors(f.A, -f.B, f.scale) for module, f in state.items()}, state.extras)


def gaussian(state: AdapterState, seed: int) -> AdapterState:
    """Gaussian factors in each module, scaled to the norm that the client's own update has there."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for module, own in state.items():
        A, B = (torch.randn(factor.shape, generator=generator) for factor in (own.A, own.B))
        random = LoraFactors(A, B, own.scale)
        factors[module] = LoraFactors(A, B * (own.norm() / random.norm()), own.scale)
    return AdapterState(factors, state.extras)


def contaminated(updates: Mapping[str, ClientUpdate], client: str, kind: str, seed: int) -> ClientUpdate | None:
    """What the client sends when it is contaminated so; None where that twin was not trained."""
    own = updates[client]
    if kind in UPDATE_KINDS:
        change = sign_flip if kind == "sign flip" else gaussian
        return ClientUpdate(client, change(own.state, derive_seed(seed, kind, client)), own.num_examples)
    twin = updates.get(variant(client, kind))
    return None if twin is None else ClientUpdate(client, twin.state, twin.num_examples)


def cohorts(
    updates: Mapping[str, ClientUpdate], kinds: Sequence[str], seed: int
) -> Iterator[tuple[str, float, list[ClientUpdate], frozenset[str]]]:
    """(kind, share, what the clients send, the contaminated ones): once clean, then each kind at each share.

    A share that the pool holds several times over is drawn as often, without overlap.
    """
    ids = sound(updates, kinds)
    yield "none", 0.0, [updates[client] for client in ids], frozenset()
    pool = contaminated_pool(ids, seed)
    for kind in (*kinds, *UPDATE_KINDS):
        wrong = {client: contaminated(updates, client, kind, seed) for client in pool}
        if None in wrong.values():
            continue
        for share in SHARES:
            size = count_bad(share, len(ids))
            for start in range(0, len(pool) - size + 1, size):
                bad = pool[start : start + size]
                sent = [wrong[client] if client in bad else updates[client] for client in ids]
                yield kind, share, [update for update in sent if update is not None], frozenset(bad)


def judged(sent: Sequence[ClientUpdate], bad: frozenset[str]) -> Row:
    """What CLAIR says of one cohort, next to the truth."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = aggregate(sent, "clair", refine="none")
    flagged, facts = set(found.flagged), found.diagnosis
    row: Row = {
        "clients": len(sent),
        "contaminated": len(bad),
        "found": len(flagged & bad),
        "wrongly_flagged": len(flagged - bad),
        "identifiable": int(facts["identifiable"]),
        "agreement": round(float(facts["agreement"]), 4),
    }
    for kind in EVIDENCE:
        scores = {client: float(evidence[kind].score) for client, evidence in found.evidence.items()}
        row[f"auc_{kind}"] = round(auc(scores, bad), 4)
        row[f"{kind}_usable"] = int(any(e[kind].threshold is not None for e in found.evidence.values()))
    return row


def auc(scores: Mapping[str, float], bad: Iterable[str]) -> float:
    """Chance that a contaminated client scores above an honest one, ties counting half; NaN without both."""
    bad = set(bad)
    pairs = [(scores[b], scores[h]) for b in bad for h in scores if h not in bad]
    return sum((b > h) + (b == h) / 2 for b, h in pairs) / len(pairs) if pairs else float("nan")


def detect(setting: Setting, split: str, seed: int, cache_dir: Path) -> Iterator[Row]:
    """A row for each cohort of one (setting, split, seed), if the cache holds all of it."""
    folder = run_folder(setting, split, seed, cache_dir)
    if not is_complete(folder):
        return
    updates = trained(folder)
    draws: dict[tuple[str, float], int] = {}
    for kind, share, sent, bad in cohorts(updates, setting.kinds, seed):
        draw = draws[kind, share] = draws.get((kind, share), -1) + 1
        where: Row = {"data": setting.name, "split": split, "kind": kind, "share": share, "seed": seed, "draw": draw}
        yield where | judged(sent, bad)


def pooled(rows: Sequence[Row]) -> list[Row]:
    """A row for each cell, over its seeds and draws: precision (NaN where nothing was flagged), recall, false positives
    among the honest; `identifiable`: share of cohorts in which CLAIR found common structure."""

    def cell(row: Row) -> tuple[str, ...]:
        return str(row["data"]), str(row["split"]), str(row["kind"]), str(row["share"])

    first = {cell(row): place for place, row in reversed(list(enumerate(rows)))}
    table = []
    for _, group in groupby(sorted(rows, key=lambda row: first[cell(row)]), key=cell):
        runs = list(group)
        total = {name: sum(int(run[name]) for run in runs) for name in ("clients", *_COUNTS)}
        flagged = total["found"] + total["wrongly_flagged"]
        honest = total["clients"] - total["contaminated"]
        entry: Row = {name: runs[0][name] for name in ("data", "split", "kind", "share")}
        entry |= {"cohorts": len(runs), "contaminated": total["contaminated"], "honest": honest}
        entry["precision"] = _ratio(total["found"], flagged)
        entry["recall"] = _ratio(total["found"], total["contaminated"])
        entry["false_positive_rate"] = _ratio(total["wrongly_flagged"], honest)
        for name in ("identifiable", "agreement", *(f"auc_{kind}" for kind in EVIDENCE)):
            entry[name] = round(sum(float(run[name]) for run in runs) / len(runs), 3)
        table.append(entry)
    return table


_COUNTS = ("contaminated", "found", "wrongly_flagged")


def _ratio(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else float("nan")
