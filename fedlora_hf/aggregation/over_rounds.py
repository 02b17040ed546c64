"""Evidence on clients over rounds: who is flagged, who has turned, who is near the line. All pure functions.

Flags follow the evidence of all rounds remembered, so that no single round accuses a client with a past; influence
follows that of the round alone (`numerics.clair.influence`), so that no past speaks for a client that turns.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from fedlora_hf.aggregation.cohort import Cohort
from fedlora_hf.numerics import clair as numerics
from fedlora_hf.numerics.clair.evidence import Judgement
from fedlora_hf.numerics.clair.influence import trust
from fedlora_hf.numerics.evidence import Evidence, Kind

Found = Mapping[str, Mapping[str, Evidence]]
# Rounds that are remembered of a client, for each kind of evidence those in which it could tell: after so many honest
# ones nothing is held against it.
MEMORY = 8
# Share of its threshold below which the combined evidence on a flagged client must fall before it is taken back in.
CLEARED = 0.5
BOTH = (Kind.SUBSPACE, Kind.DIRECTION)
# Share of its threshold from which evidence is named, though nobody is flagged on it.
NEAR = 0.5
# How much further from the core than in its own past, in scores (1: from the core to an unrelated client, or 5 times
# the norm), a client is said to have turned.
TURNED = 0.5


def found_in(cohort: Cohort, judgement: Judgement) -> dict[str, dict[str, Evidence]]:
    """{client: {kind: Evidence}} of this round's updates, with DRIFT for clients that have a past: it has no threshold,
    so it flags nobody."""
    found = {client: judgement.of(k) for k, client in enumerate(cohort.ids)}
    for client, kinds in found.items():
        past = [entry.evidence[client] for entry in cohort.past if client in entry.evidence]
        if (moved := drift(kinds, past)) is not None:
            kinds[Kind.DRIFT] = Evidence(moved, None)
    return found


def _rounds(cohort: Cohort, this_round: Found) -> list[Found]:
    """What every round found, this one last, with its functional evidence where that was taken."""
    now = {
        client: {**kinds, Kind.FUNCTIONAL: cohort.functional[client]} if client in cohort.functional else kinds
        for client, kinds in this_round.items()
    }
    return [*(past.evidence for past in cohort.past), now]


def trusted_now(cohort: Cohort, rule: str) -> Tensor | None:
    """(K,) in [0, 1]: what the functional evidence of this round alone leaves of each client's influence; None where
    there is none. Under the plain rule ("flags") all or, above the threshold, nothing."""
    if not cohort.functional:
        return None
    found = [cohort.functional.get(client, Evidence(0.0, None)) for client in cohort.ids]
    kept = [trust(*item) if rule == "taper" else float(not item.flagged) for item in found]
    return torch.tensor(kept, dtype=torch.float64)


def drift(now: Mapping[str, Evidence], past: Iterable[Mapping[str, Evidence]]) -> float | None:
    """How much further from the core a client is than in its own past: the largest over direction and scale of its
    score less the mean of its last MEMORY ones. None without a past in which either was usable.

    Scores are taken against the core of their own round, so a federation that moves together drifts nowhere.
    """
    past, moved = list(past), []
    for kind in (Kind.DIRECTION, Kind.SCALE):
        seen = [kinds[kind].score for kinds in past if _usable(kinds, kind)][-MEMORY:]
        if seen and _usable(now, kind):
            moved.append(now[kind].score - sum(seen) / len(seen))
    return max(moved, default=None)


def _usable(kinds: Mapping[str, Evidence], kind: str) -> bool:
    return kind in kinds and kinds[kind].threshold is not None


def combined(cohort: Cohort, this_round: Found) -> dict[str, dict[str, Evidence]]:
    """Evidence on the clients of this round, with what earlier rounds found of them."""
    everything = accumulated(_rounds(cohort, this_round))
    return {client: everything[client] for client in cohort.ids}


def accumulated(rounds: Iterable[Found], decay: float = 1.0) -> dict[str, dict[str, Evidence]]:
    """{client: {kind: Evidence}} from the evidence of several rounds, oldest first.

    Per client and kind the mean of score / threshold, each held to [-4, 4], against 1, over its last MEMORY rounds in
    which something could be said. A pure function: keep the rounds' evidence and ask again after each.
    """
    return numerics.accumulate(list(rounds), decay, MEMORY)


def verdict(cohort: Cohort, judgement: Judgement) -> Tensor:
    """(K,) bool: flagged on the evidence of the rounds so far, or by the same kind in each of the client's last two
    rounds, whatever it was before [our choice: one round is not enough, a past of many must not hide two].

    Whoever was flagged in its last round stays so until the combined evidence, of all rounds and of those that could
    have flagged a stranger, has fallen below CLEARED of its threshold: once left out, a contaminated client is measured
    against a federation it no longer shapes, and rounds that tell little should not let it back in [our choice].
    """
    if not (cohort.past or cohort.functional):
        return judgement.flagged
    this_round = found_in(cohort, judgement)
    suspects = {client for client in cohort.ids if _last_flagged(cohort, client)}
    everything = combined(cohort, this_round)
    rounds = _rounds(cohort, this_round)
    telling = accumulated([_telling(found) for found in rounds])
    return torch.tensor(
        [
            any(e.flagged for e in everything[client].values())
            or _twice(cohort, client, rounds[-1][client])
            or (client in suspects and any(map(_lingers, (*everything[client].values(), *telling[client].values()))))
            for client in cohort.ids
        ]
    )


def _twice(cohort: Cohort, client: str, now: Mapping[str, Evidence]) -> bool:
    """Whether one kind was above its threshold now and the last time it could tell."""
    for kind in (kind for kind, found in now.items() if found.flagged):
        before = [p.evidence[client][kind] for p in cohort.past if _usable(p.evidence.get(client, {}), kind)]
        if before and before[-1].flagged:
            return True
    return False


def _last_flagged(cohort: Cohort, client: str) -> bool:
    """Whether the client was flagged in the last round it took part in."""
    rounds = [past for past in cohort.past if client in past.evidence]
    return bool(rounds) and client in rounds[-1].flagged


def _telling(found: Found) -> dict[str, dict[str, Evidence]]:
    """A round's evidence without the kinds that could flag opposition alone: there an unrelated client passes.

    A client near the core in both kinds at once was seen, though each then raises the other's threshold for it.
    """
    return {
        client: {
            kind: evidence
            for kind, evidence in kinds.items()
            if kind not in BOTH or evidence.threshold is None or evidence.threshold < 1 or _near_the_core(kinds)
        }
        for client, kinds in found.items()
    }


def _near_the_core(kinds: Mapping[str, Evidence]) -> bool:
    return all(_usable(kinds, kind) and kinds[kind].score < CLEARED for kind in BOTH)


def _lingers(evidence: Evidence) -> bool:
    return evidence.threshold is not None and evidence.score > CLEARED * evidence.threshold


def suspicion(flagged: Collection[str], this_round: Found, evidence: Found) -> dict[str, tuple[str, float]]:
    """{client: (kind, how far of the way to the line)} of those not flagged whose evidence, of the round or combined,
    is beyond NEAR of its threshold, or who have turned ("drift", as a share of TURNED). The kind is the strongest."""
    named = {}
    for client, kinds in this_round.items():
        if client in flagged:
            continue
        shares = [(kind, _share(found)) for kinds in (kinds, evidence[client]) for kind, found in sorted(kinds.items())]
        if Kind.DRIFT in kinds and kinds[Kind.DRIFT].score > TURNED:
            shares.append((Kind.DRIFT, kinds[Kind.DRIFT].score / TURNED))
        kind, share = max(shares, key=lambda item: item[1], default=("", 0.0))
        if share > NEAR:
            named[client] = (str(kind), share)
    return named


def _share(evidence: Evidence) -> float:
    return evidence.score / evidence.threshold if evidence.threshold else 0.0
