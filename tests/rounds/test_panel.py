"""Who judges: all where it is cheap by counts of tokens, on as many examples as stay below a tenth of the training."""
# SPDX-License-Identifier: Apache-2.0

import pytest

from fedlora_hf.rounds.panel import (
    CHEAP,
    LEAST_EXAMPLES,
    PASSES,
    Split,
    cheap_panel,
    cost,
    drawn,
    rows_drawn,
    whole_panel,
)

SPLITS = {f"c{number}": Split(10 + number, 20.0) for number in range(8)}


def test_the_cost_is_passes_through_the_model_beside_those_of_training() -> None:
    examples = {"c0": 3, "c1": 2}
    assert cost(examples, SPLITS, updates=4, training=1000.0) == pytest.approx((4 + 3) * 5 * 20 / (PASSES * 1000))
    assert cost(examples, SPLITS, 4, 0.0) == float("inf")


def test_all_judge_on_the_most_examples_that_are_cheap() -> None:
    panel = cheap_panel(SPLITS, 8, 8, 40_000.0)
    assert panel is not None
    assert set(panel.examples) == set(SPLITS)
    assert set(panel.examples.values()) == {6}
    assert panel.cost < CHEAP
    assert panel.cost == cost(panel.examples, SPLITS, 8, 40_000.0)
    assert cost(dict.fromkeys(SPLITS, 7), SPLITS, 8, 40_000.0) >= CHEAP


def test_no_more_examples_than_a_judge_has() -> None:
    panel = cheap_panel(SPLITS, 8, 8, 1e9)
    assert panel is not None
    assert panel.examples == {judge: split.examples for judge, split in SPLITS.items()}


def test_nobody_judges_where_that_is_not_cheap_or_the_able_are_no_majority() -> None:
    tight = (8 + 3) * 8 * LEAST_EXAMPLES * 20 / PASSES / CHEAP
    assert cheap_panel(SPLITS, 8, 8, tight) is None  # not below it
    assert cheap_panel(SPLITS, 8, 8, tight * 1.001) is not None
    assert cheap_panel(SPLITS, 16, 16, 1e9) is None
    assert cheap_panel(SPLITS, 15, 15, 1e9) is not None


def test_short_splits_are_enough_where_nobody_has_more() -> None:
    panel = cheap_panel(dict.fromkeys("abc", Split(2, 10.0)), 3, 3, 1e6)
    assert panel is not None
    assert panel.examples == dict.fromkeys("abc", 2)


def test_a_panel_of_n_has_one_more_and_whole_splits() -> None:
    panel = whole_panel(SPLITS, 3, 8, 1e5, 0)
    assert len(panel.examples) == 4
    assert all(panel.examples[judge] == SPLITS[judge].examples for judge in panel.examples)
    assert panel.cost == cost(panel.examples, SPLITS, 8, 1e5)


def test_the_draws_are_functions_of_the_seed_and_the_clients() -> None:
    assert drawn(SPLITS, 4, 3) == drawn(dict(reversed(SPLITS.items())), 4, 3)
    assert len(set(drawn(SPLITS, 4, 3))) == 4
    assert drawn(SPLITS, 99, 0) == sorted(SPLITS)
    assert "none" not in drawn({**SPLITS, "none": Split(0, 0.0)}, 99, 0)
    assert len({tuple(drawn(SPLITS, 4, seed)) for seed in range(20)}) > 10
    rows = rows_drawn({"c1": 4, "c0": 3}, SPLITS, 5)
    assert rows == rows_drawn({"c0": 3, "c1": 4}, SPLITS, 5)
    assert {judge: len(set(places)) for judge, places in rows.items()} == {"c0": 3, "c1": 4}
    assert rows["c1"] == sorted(rows["c1"])
    assert max(rows["c1"]) < 11
    assert rows != rows_drawn({"c1": 4, "c0": 3}, SPLITS, 6)
