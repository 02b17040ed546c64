"""Groups of clients on planted cohorts: what a minority ends with, what is parted by mistake, and who hides behind it.

python -m scripts.experiments.groups --seed 0 --seeds 20

Three csv files in docs/results/groups: minority.csv (2 to 4 of 12 clients with another task; the error of the global
and personal adapters), splits.csv (how often the families of families.py are parted, and how), colluding.csv (what the
majority's adapter is worth beside colluding clients, with one global adapter and with groups).
"""
# SPDX-License-Identifier: Apache-2.0

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedlora_hf.aggregation import aggregate
from fedlora_hf.aggregation.clair import CohortSource
from fedlora_hf.aggregation.cohort import Cohort as Round
from fedlora_hf.aggregation.groups import Standing, aggregate_groups
from fedlora_hf.methods.clair import FIRST, ClairOptions
from fedlora_hf.numerics.clair.groups import everyone, groups, similarities
from fedlora_hf.update import AdapterState, Aggregate, ClientUpdate, LoraFactors
from scripts.experiments.cohorts import IN, OUT, generator, noise, normal, unit
from scripts.experiments.families import HELD_OUT, TUNING, WEAK, Cohort
from scripts.experiments.tables import arguments, write_csv

CLIENTS, RANK, LEVEL, MODULES = 12, 4, 0.6, ("q", "v", "o")
WAYS = ("alone", "one", "one, personal", "groups", "groups, personal")
Row = dict[str, Any]


def updates_of(cohort: Cohort) -> list[ClientUpdate]:
    """Clients "000", "001" ... with these matrices as their updates, exactly."""
    count = len(next(iter(cohort.values())))
    return [ClientUpdate(f"{k:03d}", state_of({m: W[k] for m, W in cohort.items()})) for k in range(count)]


def state_of(matrices: Mapping[str, Tensor]) -> AdapterState:
    """The adapter that changes each module by such a matrix."""
    return AdapterState({m: LoraFactors(torch.eye(W.shape[1], dtype=W.dtype), W) for m, W in matrices.items()})


def by_group(updates: Sequence[ClientUpdate], rank: int | None = None) -> Aggregate:
    """One round with groups, from nothing. rank: of the adapters."""

    def rule(updates: Sequence[ClientUpdate], *, method: str, reference: AdapterState | None, since: int) -> Aggregate:
        return aggregate(updates, method, reference=reference, target_rank=rank)

    return aggregate_groups(updates, {FIRST: Standing((), None)}, 1, rule, ClairOptions())


def planted(few: int, between: float, g: torch.Generator) -> tuple[Cohort, dict[str, list[Tensor]]]:
    """(updates, what each client should end with): a task of the many, another of the last `few`, whose cosine to it is
    `between`; each client a little off its task, and estimated with noise."""
    sent: Cohort = {}
    truth: dict[str, list[Tensor]] = {}
    for module in MODULES:
        task = unit(normal(g, OUT, RANK) @ normal(g, RANK, IN))
        own = unit(normal(g, OUT, RANK) @ normal(g, RANK, IN))
        other = between * task + (1 - between**2) ** 0.5 * own
        tasks = [task] * (CLIENTS - few) + [other] * few
        truth[module] = [unit(W + 0.3 * unit(normal(g, OUT, 1) @ normal(g, 1, IN))) for W in tasks]
        sent[module] = [W + noise(g, LEVEL) for W in truth[module]]
    return sent, truth


def error(state: AdapterState, truth: dict[str, list[Tensor]], client: int) -> float:
    """||W - W_client|| / ||W_client||, all modules together."""
    lost = sum(float((state[m].dense(torch.float64) - W[client]).norm() ** 2) for m, W in truth.items())
    return (lost / sum(float(W[client].norm() ** 2) for W in truth.values())) ** 0.5


def one_cohort(few: int, between: float, seed: int) -> tuple[bool, int, dict[str, list[float]]]:
    """(the groups are right, how many of the few one global adapter flags, {"few: alone" ...: errors}) of a cohort."""
    cohort, truth = planted(few, between, generator("groups", few, str(between), seed))
    updates = updates_of(cohort)
    one, several = aggregate(updates, "clair"), by_group(updates)
    of = {client: group.state for group in several.groups.values() for client in group.clients}
    found: dict[str, list[float]] = {}
    for k, update in enumerate(updates):
        name, kind = update.client_id, "many" if k < CLIENTS - few else "few"
        states = {"alone": update.state, "one": one.state, "one, personal": one.personalised.get(name)}
        states |= {"groups": of[name], "groups, personal": several.personalised.get(name, update.state)}
        for way, state in states.items():
            if state is not None:  # the flagged have no personal adapter
                found.setdefault(f"{kind}: {way}", []).append(error(state, truth, k))
    names = [update.client_id for update in updates]
    parted = [set(group.clients) for group in several.groups.values()] == [set(names[:-few]), set(names[-few:])]
    return parted, len(set(one.flagged) & set(names[-few:])), found


def minority(seed: int, seeds: int) -> list[Row]:
    """The error of the few and of the many, alone, with one global adapter and with groups."""
    rows: list[Row] = []
    ways = [f"{kind}: {way}" for kind in ("few", "many") for way in WAYS]
    for few, between in itertools.product((2, 3, 4), (0.0, 0.2, 0.4, 0.6)):
        cohorts = [one_cohort(few, between, i) for i in range(seed, seed + seeds)]
        row: Row = {"few": few, "cosine of the tasks": between}
        row |= {"groups right": f"{sum(right for right, _, _ in cohorts)} of {seeds}"}
        row |= {"few flagged with one": f"{sum(bad for _, bad, _ in cohorts)} of {few * seeds}"}
        for way in ways:
            values = [value for _, _, found in cohorts for value in found.get(way, [])]
            row[way] = round(statistics.mean(values), 3) if values else ""
        rows.append(row)
    return rows


def sizes_of(cohort: Cohort) -> tuple[int, ...]:
    """How many clients are in each group of a cohort."""
    updates = tuple(updates_of(cohort))
    similarity, chance = similarities(CohortSource(Round(updates, "uniform", tuple(sorted(cohort)))), ClairOptions())
    return tuple(len(group.members) for group in everyone(similarity, groups(similarity, chance)))


def splits(seed: int, seeds: int) -> list[Row]:
    """How often the families' clean cohorts are parted."""
    rows: list[Row] = []
    for name, family in (TUNING | HELD_OUT | WEAK).items():
        for K in (8, 12, 20, 50):
            count = max(2, seeds if K < 50 else seeds // 4)
            sizes = []
            for i in range(seed, seed + count):
                sizes.append(sizes_of(family(K, generator("splits", name, K, i))))
            parted = [size for size in sizes if len(size) > 1]
            told = "; ".join("+".join(map(str, size)) for size in parted[:4])
            rows.append({"family": name, "K": K, "cohorts": count, "parted": len(parted), "sizes": told})
    return rows


def colluding(seed: int, seeds: int) -> list[Row]:
    """Error of the honest majority's adapter beside clients that send one wrong direction, at several distances."""
    rows: list[Row] = []
    for bad in (2, 4, 5):
        for towards in (0.0, 0.2, 0.4, 0.6):
            found: dict[str, list[float]] = {"oracle": [], "one": [], "groups": []}
            own_group = 0
            for i in range(seed, seed + seeds):
                g = generator("colluding", bad, str(towards), i)
                cohort, truth = planted(bad, towards, g)
                for module in MODULES:
                    cohort[module][-bad:] = [3.0 * W for W in cohort[module][-bad:]]
                updates = updates_of(cohort)
                mean = state_of({m: torch.stack(W[:-bad]).mean(0) for m, W in cohort.items()})
                several = by_group(updates)
                honest = {update.client_id for update in updates[:-bad]}
                own_group += len(several.groups) > 1 and set(several.groups[FIRST].clients) == honest
                for what, state in (
                    ("oracle", mean),
                    ("one", aggregate(updates, "clair").state),
                    ("groups", several.state),
                ):
                    found[what] += [error(state, truth, k) for k in range(CLIENTS - bad)]
            rows.append(
                {"colluding": bad, "cosine to the honest": towards, "a group of their own": f"{own_group} of {seeds}"}
                | {what: round(statistics.mean(values), 3) for what, values in found.items()}
            )
    return rows


def main() -> None:
    args = arguments("groups", __doc__)
    seeds = 2 if args.quick else args.seeds
    for name, make in (("minority", minority), ("colluding", colluding), ("splits", splits)):
        rows = make(args.seed, seeds)
        write_csv(args.output_dir / f"{name}.csv", rows)
        print(f"{name}:")
        for row in rows:
            print("| " + " | ".join(map(str, row.values())) + " |")


if __name__ == "__main__":
    main()
