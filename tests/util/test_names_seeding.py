"""Client ids that are fit, and seeds that depend on what they are for alone."""
# SPDX-License-Identifier: Apache-2.0

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedlora_hf.util.names import MAX_ID_LENGTH, fit_id, unfit_reason
from fedlora_hf.util.seeding import derive_seed


@pytest.mark.parametrize("client_id", ["a", "0", "client_7", "open-qa", "v1.2", "A" * MAX_ID_LENGTH])
def test_fit_ids(client_id: str) -> None:
    assert unfit_reason(client_id) is None
    assert fit_id(client_id) == client_id


@pytest.mark.parametrize(
    "client_id",
    ["", ".", "..", "a/b", "../x", "a..b", "-x", "x.", "con", "NUL.txt", "a b", "é", "a\n", "A" * 97, 7, None],
)
def test_unfit_ids_get_a_reason_of_one_line(client_id: object) -> None:
    reason = unfit_reason(client_id)
    assert reason is not None
    assert "\n" not in reason


@given(st.text(max_size=200))
@example("0…0")  # an ellipsis is three dots
def test_fit_id_is_always_fit(text: str) -> None:
    assert unfit_reason(fit_id(text)) is None


def test_seeds_are_fixed_and_differ_by_purpose() -> None:
    # The value is part of the contract: a stored seed must give the same run on any machine, in any version.
    assert derive_seed(0, "batches", 3, "a") == derive_seed(0, "batches", 3, "a")
    paths = [(), ("batches",), ("batches", 3), ("batches", "3"), ("batches", 3, "a"), ("cohort", 3)]
    seeds = {derive_seed(run, *path) for run in (0, 1) for path in paths}
    assert len(seeds) == 2 * len(paths)
    assert all(0 <= seed < 2**63 for seed in seeds)
