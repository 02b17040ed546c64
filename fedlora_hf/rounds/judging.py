"""Judging where the clients' data are here: who judges a round's updates, their losses measured in the one model."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fedlora_hf.rounds.judges import Functional, functional_evidence, mixture
from fedlora_hf.rounds.panel import Panel, Split, cheap_panel, rows_drawn, whole_panel
from fedlora_hf.training.local import trained_rows
from fedlora_hf.training.side_scores import owners_losses
from fedlora_hf.update import AdapterState, ClientUpdate
from fedlora_hf.util.seeding import derive_seed

if TYPE_CHECKING:
    from fedlora_hf.config import FederatedConfig
    from fedlora_hf.data.prepare import ClientData
    from fedlora_hf.launch.processes import Processes
    from fedlora_hf.training.scorer import Scorer


def planned(
    args: "FederatedConfig", clients: Mapping[str, "ClientData"], cohort: Sequence[str], seed: int
) -> Panel | None:
    """Who judges a round of this cohort, as the options say; None for nobody: it would not be cheap, or nobody can."""
    data = {client: clients[client] for client in cohort}
    splits = {client: split_of(found.validation) for client, found in data.items() if found.validation is not None}
    splits = {client: split for client, split in splits.items() if split.examples}
    training = sum(trained_rows(args, len(found.train)) * found.train.mean_length for found in data.values())
    if not splits:
        return None
    if args.functional_judges == "auto":
        return cheap_panel(splits, len(cohort), len(cohort), training)
    return whole_panel(splits, int(args.functional_judges or 0), len(cohort), training, seed)


def measured(
    scorer: "Scorer",
    panel: Panel,
    validation: Mapping[str, Any],
    start: AdapterState,
    mean: AdapterState,
    influence: Mapping[str, float],
    updates: Sequence[ClientUpdate],
    processes: "Processes",
    seed: int,
) -> Functional:
    """Functional evidence on these updates, by the panel's judges who have any influence.

    validation: {client: its tokenised validation split}. start, mean, influence: see `functional_evidence`. Processes
    that do not work together share the updates out, and all of them get the evidence.
    """
    heard = {judge: count for judge, count in panel.examples.items() if influence.get(judge, 0.0) > 0}
    places = rows_drawn(heard, {judge: Split(len(validation[judge]), 0.0) for judge in heard}, seed)
    rows = [validation[judge][place] for judge in heard for place in places[judge]]
    owners = [judge for judge in heard for _ in places[judge]]

    def losses(states: Iterable[AdapterState]) -> Iterator[dict[str, float]]:
        return owners_losses(scorer, states, rows, owners)

    number, count = (0, 1) if processes.together else (processes.number, processes.count)
    mine = updates[number::count] if rows else ()
    with processes.all_or_none():
        mixtures = (mixture(mean, update.state.in_memory()) for update in mine)
        own = dict(zip((update.client_id for update in mine), losses(mixtures), strict=True))
        first, usual, diluted = losses((start, mean, mixture(mean, start))) if rows else ({}, {}, {})
    mixed = processes.gathered(own) or {update.client_id: {} for update in updates}
    found = functional_evidence(first, usual, diluted, mixed, influence)
    facts = {"judges": dict(heard), "weights": {judge: influence[judge] for judge in heard}, "cost": panel.cost}
    return replace(found, facts=facts)


def split_of(rows: Any) -> Split:
    return Split(len(rows), sum(map(len, rows["input_ids"])) / max(len(rows), 1))


def seed_of(args: "FederatedConfig", number: int) -> int:
    """What a round's panel and its examples are drawn from."""
    return derive_seed(args.seed, "functional", number)
