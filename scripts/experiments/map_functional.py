"""Functional evidence on the validity map's clients: judged by the loss they cause to others."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterator, Sequence
from pathlib import Path

from fedlora_hf.aggregation import aggregate
from fedlora_hf.launch.processes import Processes
from fedlora_hf.rounds.judging import measured, split_of
from fedlora_hf.rounds.panel import whole_panel
from fedlora_hf.update import ClientUpdate
from scripts.experiments.map_clients import SHARES, Setting, is_complete, run_folder, trainer, variant
from scripts.experiments.map_detection import Row, auc, cohorts, trained


def functional(
    setting: Setting, split: str, seed: int, kinds: Sequence[str], judges: int, cache_dir: Path
) -> Iterator[Row]:
    """A row for each kind, and the clean cohort, at the larger share of contaminated clients, if the cache holds all.

    A contaminated client judges by its own spoiled validation split; one that spoils updates has a sound one.
    """
    folder = run_folder(setting, split, seed, cache_dir)
    if not is_complete(folder):
        return
    updates = trained(folder)
    federation = trainer(setting, split, seed, cache_dir)
    data = federation.clients
    for kind, share, sent, bad in cohorts(updates, setting.kinds, seed):
        if kind not in ("none", *kinds) or (bad and share != SHARES[-1]):
            continue
        own = {client: variant(client, kind) if client in bad else client for client in ids(sent)}
        validation = {client: data[own[client] if own[client] in data else client].validation for client in own}
        mean = aggregate(sent, "clair")
        panel = whole_panel({c: split_of(rows) for c, rows in validation.items()}, judges, len(sent), 1.0, seed)
        start, kept = federation.initial, mean.influence
        scorer, alone = federation.scorer, Processes()
        found = measured(scorer, panel, validation, start, mean.state, kept, sent, alone, seed)
        flagged = {client for client, evidence in found.evidence.items() if evidence.flagged}
        row: Row = {"data": setting.name, "split": split, "kind": kind, "share": share, "seed": seed}
        row |= {"judges": judges, "clients": len(sent), "contaminated": len(bad), "found": len(flagged & bad)}
        row |= {"wrongly_flagged": len(flagged - bad), "evaluations": (len(sent) + 3) * len(found.facts["judges"])}
        row["usable"] = int(any(evidence.threshold is not None for evidence in found.evidence.values()))
        row["auc"] = round(auc({client: effect.change for client, effect in found.effects.items()}, bad), 4)
        yield row


def ids(sent: Sequence[ClientUpdate]) -> list[str]:
    return [update.client_id for update in sent]
