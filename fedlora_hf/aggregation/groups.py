"""Several global adapters: clients that agree within a group and not between are aggregated group by group.

A group once found is a federation of its own: its clients start from its adapter, are judged by its own core, and may
part again. Groups never join, and no client changes sides [our choice: either would carry what an attacker has put into
one adapter over to another].
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fedlora_hf.aggregation.clair import CohortSource
from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.aggregation.screening import screen
from fedlora_hf.methods.clair import FIRST, LEAST_CLIENTS, ClairOptions
from fedlora_hf.numerics.clair import LazyMapping
from fedlora_hf.numerics.clair.groups import LEAST_MEMBERS, everyone, groups, similarities
from fedlora_hf.update import AdapterState, Aggregate, ClientUpdate, Group

_NOTHING = AdapterState({})


@dataclass(frozen=True, eq=False)
class Standing:
    """A group before a round. clients: sorted, present or not. start: the adapter they begin the round with; None:
    nothing. since: the round that the group was found in, from which on evidence on its clients counts."""

    clients: tuple[str, ...]
    start: AdapterState | None
    since: int = 0


class Rule(Protocol):
    """The aggregate of one group's updates by `method`, from the evidence of the rounds from `since` on."""

    def __call__(
        self, updates: Sequence[ClientUpdate], *, method: str, reference: AdapterState | None, since: int
    ) -> Aggregate: ...


def aggregate_groups(
    updates: Sequence[ClientUpdate], standing: Mapping[str, Standing], number: int, rule: Rule, options: ClairOptions
) -> Aggregate:
    """The aggregate of round `number`: `groups` has every group's, the rest is the first group's with what was found of
    all clients. Clients that no group knows belong to the first.

    A group of fewer than 3 has the mean of its updates: nobody can be judged there. One whose usable updates are too
    few keeps its adapter. Raises UpdateError as `rule` does, of the first group.
    """
    known = {client for group in standing.values() for client in group.clients}
    new = {update.client_id for update in updates} - known
    found: dict[str, tuple[Group, Aggregate]] = {}
    for name, group in standing.items():
        clients = tuple(sorted({*group.clients, *new})) if name == FIRST else group.clients
        mine = [update for update in updates if update.client_id in clients]
        seen = screen(mine, group.start, "quarantine")
        if name != FIRST and group.start is not None and len(seen.usable) < min(LEAST_CLIENTS, len(clients)):
            kept = Group(group.start, clients, group.since)
            found[name] = kept, Aggregate(group.start, quarantined=seen.quarantined)
            continue
        for place, part in enumerate(_parts(seen.usable, seen.modules, clients, group.start, options)):
            called = str(max(map(int, {*standing, *found})) + 1) if place else name
            since = number if place else group.since
            chosen = [update for update in mine if update.client_id in part.clients]
            method = "clair" if len(part.clients) >= LEAST_CLIENTS else "product_mean"
            result = rule(chosen, method=method, reference=group.start, since=since)
            found[called] = replace(part, state=result.state, since=since), result
    return _joined(dict(sorted(found.items(), key=lambda item: int(item[0]))))


def _parts(
    usable: Sequence[ClientUpdate],
    modules: tuple[str, ...],
    clients: tuple[str, ...],
    start: AdapterState | None,
    options: ClairOptions,
) -> list[Group]:
    """What a group parts into, the largest first; itself alone where it does not. Clients without a usable update stay
    in the largest. The adapters are not known yet."""
    if len(usable) < 2 * LEAST_MEMBERS:
        return [Group(_NOTHING, clients)]
    similarity, chance = similarities(CohortSource(Cohort(tuple(usable), "uniform", modules, None, start)), options)
    found = everyone(similarity, groups(similarity, chance))
    ids = [{usable[k].client_id for k in group.members} for group in found]
    ids[0] |= set(clients) - set().union(*ids)
    return [
        Group(_NOTHING, tuple(sorted(members)), within=group.within, between=group.between)
        for members, group in zip(ids, found, strict=True)
    ]


def _joined(found: Mapping[str, tuple[Group, Aggregate]]) -> Aggregate:
    """One aggregate of several groups'. Weights sum to 1 in each group."""
    results = [result for _, result in found.values()]
    refined = {client: result for result in results for client in result.personalised}

    def united(what: str) -> dict[str, Any]:
        every = {client: value for result in results for client, value in getattr(result, what).items()}
        return dict(sorted(every.items()))

    first = found[FIRST][1]
    return replace(
        first,
        weights=united("weights"),
        influence=united("influence"),
        suspicious=united("suspicious"),
        claimed_weights=united("claimed_weights"),
        outlier_claims=united("outlier_claims"),
        quarantined=united("quarantined"),
        evidence=united("evidence"),
        this_round={c: kinds for result in results for c, kinds in (result.this_round or result.evidence).items()},
        personalised=LazyMapping(tuple(sorted(refined)), lambda client: refined[client].personalised[client]),
        flagged=tuple(sorted(client for result in results for client in result.flagged)),
        diagnosis={**first.diagnosis, **described([group for group, _ in found.values()])},
        groups={name: group for name, (group, _) in found.items()},
        n_iter=max(result.n_iter for result in results),
        converged=all(result.converged for result in results),
    )


def described(found: Sequence[Group]) -> dict[str, str]:
    """What the diagnosis says of several groups, naming nobody; {} of a single one."""
    if len(found) < 2:
        return {}
    sizes = sorted((len(group.clients) for group in found), reverse=True)
    counts = f"{', '.join(map(str, sizes[:-1]))} and {sizes[-1]} clients"
    text = (
        f"{len(found)} groups, of {counts}, agree within and not between; each has a global adapter of its own. "
        "Clients that collude and an honest minority look alike in their updates: find out who is in a group before "
        "you trust its adapter"
    )
    if 2 * len(found[0].clients) <= sum(sizes):
        text += "; the first group is no majority, and nothing says that it is the honest one"
    return {"groups": text}
