"""The experiments on groups and flags: what is planted is found, tables say what the rows say, intervals are right."""
# SPDX-License-Identifier: Apache-2.0

import pytest

from scripts.experiments import calibrate_flags, groups, groups_trained


def test_a_planted_minority_ends_better_with_a_group_of_its_own() -> None:
    right, flagged, found = groups.one_cohort(3, 0.0, 0)
    mean = {way: sum(values) / len(values) for way, values in found.items()}
    assert right
    assert flagged == 3  # with one adapter for all
    assert mean["few: groups"] < mean["few: alone"] < mean["few: one"]
    assert abs(mean["many: groups"] - mean["many: one"]) < 0.01


def test_the_table_of_trained_cohorts_has_means_of_the_seeds() -> None:
    empty = dict.fromkeys(groups_trained.COLUMNS, "")
    rows = [
        {**empty, "setting": "dolly", "seed": "0", "groups": "a b; c d", "two: one": "3.0", "ten: one": "2.0"},
        {**empty, "setting": "dolly", "seed": "1", "two: one": "4.0", "ten: one": "2.5"},
    ]
    lines = groups_trained.table(rows).splitlines()
    assert lines[2] == "| dolly | two |  |  |  | 3.50 |  |  |  | 1 of 2 | 2 |"
    assert lines[3] == "| dolly | ten |  |  |  | 2.25 |  |  |  | 1 of 2 | 2 |"


@pytest.mark.parametrize(
    ("count", "n", "low", "high"), [(0, 120, 0.0, 0.0303), (5, 120, 0.0137, 0.0946), (8, 8, 0.6306, 1.0)]
)
def test_intervals_of_rates_are_clopper_and_pearsons(count: int, n: int, low: float, high: float) -> None:
    assert calibrate_flags.interval(count, n) == pytest.approx((low, high), abs=2e-4)


def test_cells_above_the_limit_are_named_the_worst_first() -> None:
    row = {"family": "f", "contaminated": "none", "share": 0.0, "K": 8, "flagged clean": 1, "clean clients": 40}
    row |= {"95 % from": 0.1, "95 % to": 13.2, "cohorts with one": 1, "cohorts": 5}
    rows = [{**row, "false positives %": rate, "family": name} for name, rate in (("a", 0.9), ("b", 2.5), ("c", 4.0))]
    named = calibrate_flags.named(rows).splitlines()
    assert [line.split(" | ")[0] for line in named[2:]] == ["| c", "| b"]
    assert calibrate_flags.named(rows[:1]) == ""
