"""Who judges a round's updates, on how many examples, and what that costs beside the training: from counts alone.

A cost in seconds would differ from machine to machine, and with it who is judged; counts of tokens do not.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedlora_hf.util.seeding import derive_seed

# Scoring is cheap below this share of the round's training.
CHEAP = 0.1
# Passes through the model that a training step costs, of which scoring is one: forward, and backward at about twice it.
PASSES = 3.0
# Examples of a judge below which its loss says little; of a shorter split all are taken.
LEAST_EXAMPLES = 4


@dataclass(frozen=True)
class Split:
    """A validation split: how many examples, and how many tokens an example has on average."""

    examples: int
    tokens: float


@dataclass(frozen=True)
class Panel:
    """examples: {judge: on how many of its validation examples}, sorted by judge. cost: of scoring, as a share of the
    round's training."""

    examples: Mapping[str, int]
    cost: float


def whole_panel(splits: Mapping[str, Split], judges: int, updates: int, training: float, seed: int) -> Panel:
    """`judges` + 1 clients drawn from the seed, each with its whole split, so that whoever is among them is judged by
    `judges` others. training: tokens that the round's training steps see."""
    examples = {judge: splits[judge].examples for judge in drawn(splits, judges + 1, seed)}
    return Panel(examples, cost(examples, splits, updates, training))


def cheap_panel(splits: Mapping[str, Split], cohort: int, updates: int, training: float) -> Panel | None:
    """Everybody with a validation split, each with as many of its examples as together cost less than CHEAP; None where
    these would be fewer than LEAST_EXAMPLES, or the able are no majority of the cohort.

    All judge on few examples, and not a few on all: whoever lies is then outvoted while liars are a minority.
    """
    able = {client: split for client, split in sorted(splits.items()) if split.examples}
    if 2 * len(able) <= cohort:
        return None
    most = max(split.examples for split in able.values())
    low, high = 0, most  # the largest number whose cost is below CHEAP, by bisection
    while low < high:
        middle = (low + high + 1) // 2
        cheap = cost(_at_most(able, middle), able, updates, training) < CHEAP
        low, high = (middle, high) if cheap else (low, middle - 1)
    if low < min(LEAST_EXAMPLES, most):
        return None
    examples = _at_most(able, low)
    return Panel(examples, cost(examples, able, updates, training))


def cost(examples: Mapping[str, int], splits: Mapping[str, Split], updates: int, training: float) -> float:
    """Scoring every update, the mean, the round's start and what is between on these examples, as a share of the
    training's passes."""
    tokens = sum(count * splits[judge].tokens for judge, count in examples.items())
    return (updates + 3) * tokens / (PASSES * training) if training > 0 else float("inf")


def drawn(splits: Mapping[str, Split], count: int, seed: int) -> list[str]:
    """`count` of the clients that have validation examples, or all of them; sorted, a function of the seed."""
    able = sorted(client for client, split in splits.items() if split.examples)
    order = np.random.default_rng(derive_seed(seed, "judges")).permutation(len(able))
    return sorted(able[place] for place in order[:count])


def rows_drawn(examples: Mapping[str, int], splits: Mapping[str, Split], seed: int) -> dict[str, list[int]]:
    """{judge: the places of its examples in its split, ascending}: others in every round, a function of the seed."""
    found = {}
    for judge, count in sorted(examples.items()):
        order = np.random.default_rng(derive_seed(seed, "examples", judge)).permutation(splits[judge].examples)
        found[judge] = sorted(order[:count].tolist())
    return found


def _at_most(splits: Mapping[str, Split], count: int) -> dict[str, int]:
    return {judge: min(count, split.examples) for judge, split in splits.items()}
