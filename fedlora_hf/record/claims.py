"""What clients say of themselves, looked at where it arrives: only what can be true goes into the record.

A lie within these bounds is not told from the truth: numbers that clients measure stay self-reported.
"""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Mapping

from fedlora_hf.errors import UpdateError, one_line

# Nats. A guess among a million tokens costs 14; exp(700) is the last perplexity that is a float [our choice].
LARGEST_LOSS = 700.0
LARGEST_COUNT = 2**53 - 1  # beyond it floats are no whole numbers any more
LARGEST_OTHER = 1e9  # of a metric whose name says nothing to us [our choice]
SELF_REPORTED = "self-reported by the clients"

# {metric: (smallest, largest)}: all that a client's scores may hold.
SCORES = {
    "loss": (0.0, LARGEST_LOSS),
    "perplexity": (1.0, math.exp(LARGEST_LOSS)),
    "token_accuracy": (0.0, 1.0),
    "accuracy": (0.0, 1.0),
    "num_items": (1.0, float(LARGEST_COUNT)),
}
FACTS = {"train_loss": (0.0, LARGEST_LOSS), "steps": (0.0, float(LARGEST_COUNT))}
_WHOLE = {"num_items", "steps"}

Found = tuple[dict[str, float], str]


def scores(said: Mapping[str, object]) -> Found:
    """(metrics of an adapter as a client tells them, why something was dropped, "" where nothing was).

    All are dropped where one of them cannot be true, where there is no loss, or where perplexity is not exp(loss): they
    come from one evaluation. An unknown name is dropped alone.
    """
    found, dropped = _within(said, SCORES)
    wrong = [reason for name, reason in dropped.items() if name in SCORES]
    if not wrong and said and "loss" not in found:
        wrong = ["loss is missing"]
    if not wrong and "perplexity" in found and not math.isclose(found["perplexity"], math.exp(found["loss"])):
        wrong = ["perplexity is not exp(loss)"]
    return ({}, wrong[0]) if wrong else (found, _first(dropped))


def facts(said: Mapping[str, object]) -> Found:
    """(what a client tells of its training, why something was dropped); each number stands or falls alone."""
    found, dropped = _within(said, FACTS)
    return found, _first(dropped)


def losses(said: Mapping[str, object]) -> Found:
    """(validation losses of the adapters that a client chose from, why something was dropped)."""
    found, dropped = _within(said, dict.fromkeys(said, SCORES["loss"]))
    return found, _first(dropped)


def plausible(said: Mapping[str, object], counted: str) -> dict[str, float]:
    """What may enter a mean of metrics whose names are somebody else's: finite numbers, within the ranges where the
    name is known. counted: the name of the number of examples, which must be above 0; {} where it is not."""
    ranges = dict.fromkeys(said, (-LARGEST_OTHER, LARGEST_OTHER)) | SCORES | {counted: (1.0, float(LARGEST_COUNT))}
    found = _within(said, ranges)[0]
    return found if counted in found else {}


def count(said: object) -> int:
    """A number of examples as a client tells it; UpdateError when it is none.

    0 is a number: that nothing can be learned from no examples is for screening to say.
    """
    if (
        isinstance(said, bool)
        or not isinstance(said, int | float)
        or not _whole(said)
        or not 0 <= said <= LARGEST_COUNT
    ):
        raise UpdateError(
            f"num_examples={one_line(said, 40)}: must be a whole number from 0 to 2^53 - 1; mend the client"
        )
    return int(said)


def _within(
    said: Mapping[str, object], ranges: Mapping[str, tuple[float, float]]
) -> tuple[dict[str, float], dict[str, str]]:
    """(what is known and within its range, {name: why not} of the rest)."""
    found: dict[str, float] = {}
    dropped: dict[str, str] = {}
    for name, value in said.items():
        told = one_line(name, 40)
        if name not in ranges:
            dropped[name] = f"{told!r} is not known"
        elif isinstance(value, bool) or not isinstance(value, int | float):
            dropped[name] = f"{told} is no number"
        elif not ranges[name][0] <= value <= ranges[name][1]:  # NaN is not either
            dropped[name] = f"{told}={one_line(value, 24)} is not from {ranges[name][0]:g} to {ranges[name][1]:g}"
        elif name in _WHOLE and not _whole(value):
            dropped[name] = f"{told}={one_line(value, 24)} is no whole number"
        else:
            found[name] = value
    return found, dropped


def _whole(value: float) -> bool:
    return isinstance(value, int) or value.is_integer()


def _first(dropped: Mapping[str, str]) -> str:
    """The first reason, and how many more there are."""
    reasons = list(dropped.values())
    return "" if not reasons else reasons[0] + (f", and {len(reasons) - 1} more" if len(reasons) > 1 else "")
