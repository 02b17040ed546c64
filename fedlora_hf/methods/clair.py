"""What can be set in CLAIR, with the defaults that are our choices and not the paper's."""
# SPDX-License-Identifier: Apache-2.0

import math
from dataclasses import dataclass
from typing import Literal, get_args

from fedlora_hf.errors import ConfigError
from fedlora_hf.methods.method import Method

Side = Literal["output", "input"]
Solver = Literal["irls", "convex"]
Refine = Literal["hard", "soft", "none"]
InfluenceRule = Literal["taper", "flags"]
# Fewer have no majority that one could be told from.
LEAST_CLIENTS = 3


# The group whose adapter stands for the whole run: the largest, where the clients first part.
FIRST = "1"


@dataclass(frozen=True)
class ClairOptions:
    """Options of CLAIR (He, Chen, Feng 2026, arXiv 2605.21217); every default is our choice.

    rank: directions of the shared subspace per module; "auto": those that held-out clients of the majority use more
        than chance. Clients are judged at the smallest rank that carries most of what the majority shares.
    side: "output" looks for a shared column space of W (the span of B), "input" for a shared row space (of A).
    solver: "irls" minimises the group norm of the residuals over subspaces; "convex" solves the nuclear plus
        block-norm programme by ADMM, in memory, as a reference.
    refine: "hard" keeps a client's part in the subspace and averages the rest; "soft" shrinks the kept part by its
        signal to noise; "none" gives no personalised updates.
    influence: what a client that is not flagged counts in the mean: "taper" less the further it points from the core,
        the more near-copies it has, and at a clipped norm; "flags" in full (the paper's plain rule; copies count once).
    clip: with "taper", the norm at which an update enters the mean is at most this many times the typical one.
    center: take a common component, estimated robustly, out of the updates before looking for the subspace.
    exact: personalised updates keep every rank instead of being re-factored to the target rank.
    max_iter, tol: of the solver; tol is the largest change of a client's weight between two steps.
    """

    rank: int | Literal["auto"] = "auto"
    side: Side = "output"
    solver: Solver = "irls"
    refine: Refine = "hard"
    influence: InfluenceRule = "taper"
    clip: float = 1.5
    center: bool = False
    exact: bool = False
    max_iter: int = 60
    tol: float = 1e-3

    def __post_init__(self) -> None:
        choices = {"side": Side, "solver": Solver, "refine": Refine, "influence": InfluenceRule}
        for name, allowed in ((name, get_args(choice)) for name, choice in choices.items()):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"{name}={value!r}: must be one of {', '.join(allowed)}; choose one of these")
        if self.rank != "auto" and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise ConfigError(f"rank={self.rank!r}: must be 'auto' or a whole number from 1; leave it out for 'auto'")
        if not (math.isfinite(self.clip) and self.clip > 0):
            raise ConfigError(f"clip={self.clip}: must be a number above 0; leave it out for 1.5")
        if self.max_iter < 1 or not 0 < self.tol < 1:
            raise ConfigError(
                f"max_iter={self.max_iter}, tol={self.tol}: must be at least 1 and within (0, 1); leave them out"
            )

    @property
    def rank_limit(self) -> int | None:
        """The user's rank, or None when it is to be chosen."""
        return None if self.rank == "auto" else int(self.rank)


METHODS = (
    Method(
        name="clair",
        title="Collaborative low-rank alignment and identifiable recovery",
        paper="arXiv 2605.21217, He, Chen, Feng 2026",
        averages="product",
        options=ClairOptions,
        robust=True,
        least_clients=LEAST_CLIENTS,
    ),
)
