"""What may be believed of what clients say: properties of the one validator."""
# SPDX-License-Identifier: Apache-2.0

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from fedlora_hf.errors import UpdateError
from fedlora_hf.record import claims

ANYTHING = some.one_of(
    some.floats(), some.integers(), some.booleans(), some.none(), some.text(max_size=5), some.lists(some.floats())
)
NAMES = some.one_of(some.sampled_from(sorted({*claims.SCORES, *claims.FACTS})), some.text(max_size=60))
GOOD = {"loss": 2.0, "perplexity": math.exp(2.0), "token_accuracy": 0.5, "num_items": 7}


def test_what_can_be_true_is_kept_as_it_is() -> None:
    assert claims.scores(GOOD) == (GOOD, "")
    assert claims.scores({"loss": 0.0, "accuracy": 1.0}) == ({"loss": 0.0, "accuracy": 1.0}, "")
    assert claims.scores({}) == ({}, "")
    assert claims.facts({"train_loss": 1.5, "steps": 3}) == ({"train_loss": 1.5, "steps": 3}, "")
    assert claims.losses({"own": 1.0, "mix-0.5": 2.0}) == ({"own": 1.0, "mix-0.5": 2.0}, "")


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ({"loss": -1e300}, "loss=-1e+300 is not from 0 to 700"),
        ({"loss": math.nan}, "loss=nan is not"),
        ({"loss": math.inf}, "loss=inf is not"),
        ({"loss": [1.0]}, "loss is no number"),
        ({"loss": True}, "loss is no number"),
        ({"token_accuracy": 5.0}, "token_accuracy=5.0 is not from 0 to 1"),
        ({"num_items": 2.5}, "num_items=2.5 is no whole number"),
        ({"perplexity": 3.0}, "perplexity is not exp(loss)"),
    ],
)
def test_one_lie_drops_the_evaluation_it_is_part_of(lie: dict[str, Any], reason: str) -> None:
    found, dropped = claims.scores({**GOOD, **lie})
    assert found == {}
    assert dropped.startswith(reason)


def test_an_evaluation_without_a_loss_is_none() -> None:
    assert claims.scores({"token_accuracy": 0.5}) == ({}, "loss is missing")
    assert claims.scores({"x": 1.0}) == ({}, "loss is missing")


def test_an_unknown_name_is_dropped_alone() -> None:
    assert claims.scores({**GOOD, "sota\x1b[31m": 0.99, "b": 1.0}) == (GOOD, "'sota [31m' is not known, and 1 more")


@given(some.dictionaries(NAMES, ANYTHING, max_size=6))
def test_whatever_is_said_what_is_kept_is_known_finite_and_in_range(said: dict[str, Any]) -> None:
    found, dropped = claims.scores(said)
    assert not found or "loss" in found
    for name, value in found.items():
        low, high = claims.SCORES[name]
        assert low <= value <= high < math.inf
        assert value is said[name]
    assert dropped.isprintable()
    assert len(dropped) < 200
    assert dropped or found == said
    assert all(math.isfinite(value) for value in claims.facts(said)[0].values())
    assert all(0 <= value <= claims.LARGEST_LOSS for value in claims.losses(said)[0].values())
    assert not claims.plausible({name: value for name, value in said.items() if name != "n"}, "n")
    assert all(math.isfinite(value) for value in claims.plausible({**said, "n": 3}, "n").values())


@given(ANYTHING)
def test_a_count_is_a_whole_number_within_bounds_or_an_error_of_one_line(said: Any) -> None:
    whole = not isinstance(said, bool) and isinstance(said, int | float) and math.isfinite(said) and said == int(said)
    if whole and 0 <= said < 2**53:
        assert claims.count(said) == said
        assert type(claims.count(said)) is int
    else:
        with pytest.raises(UpdateError, match="num_examples=") as refused:
            claims.count(said)
        assert str(refused.value).isprintable()
