"""How much each client counts in the mean: a smooth weight from its evidence, shared among look-alikes, a clipped norm.

A flag and a weight answer different questions. A wrong flag is an accusation, so its line lies far out; a smaller
weight costs an honest client little (it keeps its own update for its personal adapter), so influence falls long before
the line. In the model W_k = U V_k + H_k + S_k the paper's block-sparse S_k is nothing or everything; here S_k takes

    the part of a norm beyond `clip` typical norms: (1 - c_k) W_k, the proximal map of the block norm (Huber's weight);
    more and more of a client that points away from the core: a redescending weight, as of Hampel's M-estimators.

Our choice, all of it; `influence="flags"` is the paper's plain rule. Why and how far it reaches: docs/clair.md.
"""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora_hf.methods.clair import ClairOptions
from fedlora_hf.numerics.clair.consensus import cosines, counted_once, pooled
from fedlora_hf.numerics.clair.evidence import Judgement
from fedlora_hf.numerics.clair.flagging import CAP

# A client counts in full up to FULL of the flags' line, and not at all from NOTHING of it on. A wider fall (from 0.5)
# lets colluders through.
FULL, NOTHING = 0.3, 0.8
# In a single module no update counts beyond this many typical norms of it, so that what the clip allows for the whole
# cannot be spent in one place; honest clients were not seen to reach it.
MODULE_CLIP = 3.0
# The same fall from the line of functional evidence, which is measured in another unit: what of it is noise among
# honest clients ends lower, and who harms is left out long before it is flagged.
UNHARMED, HARMED = 0.15, 0.45


@dataclass(frozen=True, eq=False)
class Influence:
    """shares: (K,) weights in the mean, summing to 1. clips: (M, K) factors on the updates of each module, at most 1.
    kept: (K,) what is left of each client's influence, in [0, 1]: 1 where nothing is held against it, 0 for whoever
    is left out; before the shares are scaled up to a sum of 1."""

    shares: Tensor
    clips: Tensor
    kept: Tensor


def taper(scores: Tensor) -> Tensor:
    """(K,) weights in [0, 1] from direction scores (0: like the core, 1: unrelated to it): half a cosine from FULL to
    NOTHING of the flags' line."""
    fall = ((scores / CAP - FULL) / (NOTHING - FULL)).clamp(0, 1)
    return 0.5 * (1 + torch.cos(math.pi * fall))


def trust(score: float, threshold: float | None) -> float:
    """What functional evidence leaves of a client's influence, in [0, 1]: half a cosine from UNHARMED to HARMED of its
    line; all of it where it tells nothing."""
    if threshold is None or threshold <= 0:
        return 1.0
    fall = min(max((score / threshold - UNHARMED) / (HARMED - UNHARMED), 0.0), 1.0)
    return 0.5 * (1 + math.cos(math.pi * fall)) if fall < 1 else 0.0


def look_alikes(similarity: Tensor, counted: Tensor) -> Tensor:
    """(K,) weights in (0, 1]: clients with more near-copies than is typical share theirs. similarity: (K, K) cosines;
    counted: (K,) bool, whoever is left out crowds nobody.

    m_k = 1 + sum_j max(0, cos_jk)^2 over the others, weight = median(m) / m_k, at most 1: exact copies share one
    client's weight where the others have nothing in common, and copies that are the majority are typical. Compare
    FoolsGold (Fung et al. 2018, arXiv 1808.04866), which looks at histories of gradients.
    """
    weights = torch.ones(len(similarity), dtype=torch.float64)
    index = counted.nonzero().squeeze(1)
    alike = similarity[index][:, index].double().clamp(0, 1).square()
    crowd = 1 + alike.sum(1) - alike.diag()
    return weights.index_copy(0, index, (crowd.median() / crowd).clamp_max(1.0))


def clips(energy: Tensor, counted: Tensor, most: float) -> Tensor:
    """(K,) factors that hold norms to `most` times the median norm of the clients counted. energy: (K,) squared norms;
    clients of norm 0 are not typical of anything."""
    norm = energy.clamp_min(0).sqrt()
    typical = norm[counted & (norm > 0)]
    if not len(typical):
        return torch.ones_like(norm)
    return (most * typical.median() / norm.clamp_min(1e-300)).clamp_max(1.0)


def influence(
    shares: Tensor,
    counted: Tensor,
    judgement: Judgement,
    inner: Sequence[Tensor],
    options: ClairOptions,
    trusted: Tensor | None = None,
) -> Influence:
    """What every client counts in the mean.

    shares: (K,) by examples or uniform. counted: (K,) bool, who is neither flagged nor zero. inner: per module the
    (K, K) inner products of the changes, in units of the module's typical norm. trusted: (K,) in [0, 1], what evidence
    that is not of updates leaves of each; default all.
    """
    together = pooled(inner)
    if options.influence == "flags":
        weight, clip = counted_once(cosines(together)), torch.ones(len(inner), len(shares), dtype=torch.float64)
        kept = torch.where(counted, weight, 0.0)
    else:
        whole = clips(together.diag(), counted, options.clip)
        clip = torch.stack([torch.minimum(whole, clips(G.diag(), counted, MODULE_CLIP)) for G in inner])
        weight = look_alikes(cosines(together), counted) * _tapered(judgement)
        weight = weight if trusted is None else weight * trusted
        kept = torch.where(counted, weight * whole, 0.0)
    weight = torch.where(counted, shares.double() * weight, 0.0)
    if not float(weight.sum()) > 0:  # nobody stands out as the one to follow: those not left out count alike
        weight = counted.double()
    return Influence(weight / weight.sum(), clip, kept)


def _tapered(judgement: Judgement) -> Tensor:
    """The taper where direction tells something, else 1: influence is not taken on evidence that tells nothing."""
    scores = judgement.scores["direction"]
    return taper(scores) if judgement.weighs else torch.ones_like(scores)
