"""What the updates say of each client: three kinds of evidence, all cross-fitted, if there is a majority at all.

A flag says "unrelated to what the majority shares". Where both kinds are usable, a client is flagged only if neither
clears it: one that differs in a single way is not flagged for it.

subspace   how little of the majority's subspace the client uses, next to what the majority uses of it.
direction  how little the client points where the consensus core points.
scale      how large or small the update is.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora_hf.numerics.clair.blocks import Blocks, by_chance
from fedlora_hf.numerics.clair.consensus import Consensus, chance_agreement, copies, cosines, opposition, typical
from fedlora_hf.numerics.clair.flagging import (
    CAP,
    ERRORS,
    EXACT,
    EXACT_GUARD,
    OPPOSED_CAP,
    opposed_threshold,
    scale_scores,
    stranger_threshold,
)
from fedlora_hf.numerics.clair.subspace import Fit, common_use, each
from fedlora_hf.numerics.evidence import OF_UPDATES, Evidence

# Least agreement, and least energy beyond chance shared by a majority, that count as common structure. From FAINT on an
# agreement counts if it is BEYOND times that of chance: in large layers chance is near 0.01, and clients with little
# data agree to 0.09 without a fault in their order. Clients with one unrelated task each were seen to agree to 0.07.
AGREEMENT, FAINT, BEYOND, SHARED = 0.1, 0.08, 3.0, 0.1
# Of what clients that use the subspace at random overlap in it, what those of a majority do; rank-one clients reach the
# median of a chi-square with one degree of freedom, 0.45.
JOINT = 0.4
# Clients with one unrelated task each still share a part of their output space. Without a common direction a subspace
# tells who is contaminated only where the model holds: U V_k is most of what the core sends.
MOST = 0.5
HALF = 0.5  # of what the kept clients share, what each client of a majority must reach
# A client lives in the majority's subspace when it has 70 % of the core's share: LoRA updates trained from one base on
# constant outputs had half of it.
INSIDE = 0.3
FEW = 6
LEAST_MEMBERS = 3  # of the core, for the agreement by chance


@dataclass(frozen=True, eq=False)
class Judgement:
    """scores: {kind: (K,)}; thresholds: {kind: (K,)}, NaN where the kind is not usable. copies: groups of
    clients with the same update. diagnosis: plain values. weighs: whether direction tells enough to take influence by,
    which asks for less than a flag does."""

    scores: Mapping[str, Tensor]
    thresholds: Mapping[str, Tensor]
    copies: list[list[int]]
    diagnosis: Mapping[str, float | bool | str]
    weighs: bool = False

    @property
    def flagged(self) -> Tensor:
        """(K,) bool: some score above its threshold (no score is above NaN)."""
        return torch.stack([self.scores[kind] > self.thresholds[kind] for kind in OF_UPDATES]).any(0)

    def described(self, ids: Sequence[str]) -> dict[str, object]:
        """The diagnosis with clients by name."""
        copies = [[ids[k] for k in group] for group in self.copies]
        return {**self.diagnosis, "copies": copies}

    def of(self, k: int) -> dict[str, Evidence]:
        """The evidence on client k."""
        return {kind: _score(self.scores[kind][k], self.thresholds[kind][k]) for kind in OF_UPDATES}


def _score(score: Tensor, threshold: Tensor) -> Evidence:
    return Evidence(float(score), None if bool(threshold.isnan()) else float(threshold))


def judge(
    inner: Tensor,
    null: Tensor,
    agreed: Consensus,
    alive: Tensor,
    fit: Fit,
    modules: Sequence[Blocks],
    centered: bool = False,
) -> Judgement:
    """Scores and thresholds of every client.

    inner: (K, K) products pooled over modules, of clients in any state; null: the same by chance. alive: (K,) bool,
    clients whose update is not zero; `agreed` (their consensus in direction), `fit` and `modules` are of these alone.
    centered: a common component was taken out of `modules`; an unrelated client then has its negative in the subspace.
    """
    index = alive.nonzero().squeeze(1)
    similarity, null = cosines(inner)[index][:, index], cosines(null)
    members = _of_core(index[agreed.core], len(alive), len(null))
    # Near-copies outside the core raise the one, a core that is all alike the other; neither may hide an agreement.
    chance = min(chance_agreement(null), chance_agreement(null, members))
    aligned, direction = _direction(agreed, chance)
    against = opposition(similarity, fit.kept)
    opposed = direction is None and against > max(AGREEMENT, ERRORS * typical(null))
    joint = common_use(modules, fit)
    shared, subspace, level = _subspace(fit, modules)
    if joint <= JOINT or opposed:
        subspace = None
    if subspace is not None and direction is not None:
        subspace, direction = _vouched(torch.ones_like(shared) if centered else shared, subspace, aligned, direction)
    if subspace is not None and float(fit.residual[fit.kept].max()) ** 2 < EXACT:
        subspace = torch.full_like(shared, EXACT_GUARD)
    log_norm = inner.diag().clamp_min(1e-300).sqrt().log()
    size, limit = scale_scores(log_norm, alive)

    subspace, direction = _of_minority(shared, subspace), _of_minority(aligned, direction)
    found: dict[str, float | bool | str] = {
        "agreement": agreed.agreement,
        "agreement_by_chance": chance,
        "opposition": against,
        "shared_energy": level / len(modules),
        "shared_energy_of_majority": fit.majority / len(modules),
        "common_use": joint,
        "direction_usable": direction is not None,
        "subspace_usable": subspace is not None,
        "identifiable": direction is not None or (subspace is not None and level > MOST * len(modules)),
        "weak_evidence": len(index) < FEW,
        "opposed_majority": opposed,
        "flagged_agree": _agree(similarity, [(shared, subspace), (aligned, direction)], chance),
    }
    found["summary"] = summary(found, len(index))
    weighs = direction is not None or (agreed.agreement > BEYOND * chance and _few(aligned > CAP))
    scores = {"subspace": _spread(shared, index, alive), "direction": _spread(aligned, index, alive), "scale": size}
    limits = {"subspace": _spread(subspace, index, alive), "direction": _spread(direction, index, alive)}
    limits["scale"] = torch.full_like(size, limit)
    alike = [[int(index[k]) for k in group] for group in copies(similarity)]
    return Judgement(scores, limits, alike, found, weighs)


def _of_core(core: Tensor, K: int, count: int) -> Tensor:
    """Indices, among the `count` of K clients that are compared by chance (`blocks.by_chance`), of the members of the
    core; of all where those are too few to tell."""
    members = torch.isin(torch.arange(K)[by_chance(K)], core).nonzero().squeeze(1)
    return members if len(members) >= LEAST_MEMBERS else torch.arange(count)


def unjudged(inner: Tensor, alive: Tensor) -> Judgement:
    """When fewer than 3 updates are not zero there is no majority to be far from: nothing is usable."""
    zero = torch.zeros(len(alive), dtype=torch.float64)
    never = torch.full_like(zero, torch.nan)
    found: dict[str, float | bool | str] = {
        "agreement": 0.0,
        "identifiable": False,
        "weak_evidence": True,
        "summary": f"{int(alive.sum())} of {len(alive)} updates are not zero: too few to judge any client",
    }
    return Judgement(dict.fromkeys(OF_UPDATES, zero), dict.fromkeys(OF_UPDATES, never), [], found)


def _direction(agreed: Consensus, chance: float) -> tuple[Tensor, Tensor | None]:
    """(scores, thresholds), both (K,); None where the core agrees no more than by chance."""
    if agreed.agreement <= 0:
        return torch.zeros_like(agreed.to_core), None
    aligned = 1 - agreed.to_core / agreed.agreement
    if agreed.agreement <= max(chance, min(AGREEMENT, max(FAINT, BEYOND * chance))):
        return aligned, None
    return aligned, stranger_threshold(aligned, agreed.spread / agreed.agreement)


def _subspace(fit: Fit, modules: Sequence[Blocks]) -> tuple[Tensor, Tensor | None, float]:
    """(scores, thresholds, the kept half's energy beyond chance); None where no majority reaches enough of it."""
    gain, error, level = shared_energy(fit, modules)
    if level <= 0:
        return torch.zeros_like(gain), None, level
    shared = 1 - gain / level
    if fit.majority <= max(SHARED * len(modules), HALF * level, ERRORS * float(error.median())):
        return shared, None, level
    return shared, stranger_threshold(shared, error / level), level


def _vouched(shared: Tensor, subspace: Tensor, aligned: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Thresholds after each kind has cleared clients that the other would flag.

    A client that points where the core points has another use for the rest of its rank: its subspace alone never
    flags it. One that lives in the majority's subspace is flagged for its direction only when that is opposed. Both
    keep a threshold, so that the round still counts when rounds are combined.
    """
    vouched = torch.full_like(subspace, OPPOSED_CAP)
    subspace = torch.where(aligned > direction, subspace, torch.maximum(subspace, vouched))
    return subspace, torch.where(shared < INSIDE, torch.maximum(direction, opposed_threshold(aligned)), direction)


def _agree(similarity: Tensor, judged: Sequence[tuple[Tensor, Tensor | None]], chance: float) -> bool:
    """Whether the clients flagged for subspace or direction, at least three, agree with each other beyond chance."""
    flags = [scores > thresholds for scores, thresholds in judged if thresholds is not None]
    found = torch.stack(flags).any(0).nonzero().squeeze(1) if flags else torch.empty(0, dtype=torch.long)
    if len(found) < 3:
        return False
    among = similarity[found][:, found]
    return float(among[~torch.eye(len(found), dtype=torch.bool)].median()) > max(AGREEMENT, chance)


def _of_minority(scores: Tensor, thresholds: Tensor | None) -> Tensor | None:
    """The thresholds, or None when half of the clients would be flagged: those would be the majority."""
    return thresholds if thresholds is not None and _few(scores > thresholds) else None


def _few(found: Tensor) -> bool:
    """Whether fewer than half of the clients are meant."""
    return 2 * int(found.sum()) < len(found)


def _spread(values: Tensor | None, index: Tensor, alive: Tensor) -> Tensor:
    """Values of the clients alive as values of all: NaN for a kind not usable, 0 for the other clients."""
    if values is None:
        return torch.full((len(alive),), torch.nan, dtype=torch.float64)
    return torch.zeros(len(alive), dtype=torch.float64).index_copy(0, index, values)


def shared_energy(fit: Fit, modules: Sequence[Blocks]) -> tuple[Tensor, Tensor, float]:
    """((K,) held-out energy in the subspace beyond chance, its standard error by chance, the kept half's median).

    An unrelated block of effective rank rho puts Beta(p / 2, (out - p) / 2) of each of its rho directions into a
    rank-p subspace; modules add up.
    """
    gain = fit.gains.sum(0)
    variance = torch.zeros_like(gain)

    def squares(_: int, blocks: Blocks) -> Tensor:
        return (blocks.coords.transpose(1, 2) @ blocks.coords).double().square().sum((1, 2))

    for blocks, p, concentration in zip(modules, fit.ranks, each(modules, squares), strict=True):
        n = blocks.out
        variance += 2 * p * max(n - p, 0) / (n * n * (n + 2)) * concentration
    return gain, variance.sqrt(), float(gain[fit.kept].median())


def summary(found: Mapping[str, float | bool | str], K: int) -> str:
    """The diagnosis in words."""
    if found["direction_usable"] and found["subspace_usable"]:
        text = "common structure: shared subspace yes, common direction yes"
    elif found["direction_usable"]:
        text = "common structure: shared subspace not usable, common direction yes"
    elif found["subspace_usable"] and found["identifiable"]:
        text = "common structure: shared subspace yes, common direction no"
    elif found["subspace_usable"]:
        text = (
            "common structure: shared subspace in part, common direction no; who is unrelated to that part is flagged, "
            "but honest and contaminated clients within it cannot be told apart"
        )
    elif found["opposed_majority"]:
        text = (
            "common structure: not usable, clients that share a subspace point against each other; flags on scale alone"
        )
    else:
        text = "common structure: none, so honest and contaminated clients cannot be told apart; flags on scale alone"
    if found["flagged_agree"]:
        text += "; the flagged agree with each other: they collude, or are honest and share nothing with the majority"
    return text if K >= FEW else f"{text}; evidence is weak with {K} clients (below {FEW})"
