"""Attacks by clients who know what the others send: a round's updates as the server of a rehearsal sees them.

On disk every client's folder keeps what it trained in good faith; the attack is made when the updates are read, a pure
function of them, so that a run that is resumed meets the same attack.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedlora_hf.aggregation.attacks import ATTACKS, Known, Rule, attacked
from fedlora_hf.update import AdapterState, ClientUpdate
from fedlora_hf.util.rehearsal import Contamination
from fedlora_hf.util.seeding import derive_seed


def rehearsed(
    updates: Sequence[ClientUpdate],
    contaminated: Mapping[str, Contamination],
    start: AdapterState,
    rule: Rule,
    seed: int,
    number: int,
) -> list[ClientUpdate]:
    """The updates with those of the contaminated clients replaced by what their attack makes of them.

    start: the round's; rule: the server's, for the attack that optimises against it; number: of the round. Clients
    under one attack act together; clients under any contamination are honest to none.
    """
    states = {update.client_id: update.state for update in updates}
    honest = {client: state for client, state in states.items() if client not in contaminated}
    sent: dict[str, AdapterState] = {}
    for kind in sorted({found.kind for client, found in contaminated.items() if client in states}):
        if kind in ATTACKS:
            own = {c: state for c, state in states.items() if c in contaminated and contaminated[c].kind == kind}
            drawn = derive_seed(seed, "rehearsal", kind)
            sent |= attacked(kind, Known(honest, own, start=start, seed=drawn, round=number, rule=rule))
    return [replace(u, state=sent[u.client_id]) if u.client_id in sent else u for u in updates]
