"""Who stays flagged over rounds: strong evidence, then rounds that tell little, then rounds that clear."""
# SPDX-License-Identifier: Apache-2.0

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedlora_hf.aggregation.cohort import PastRound
from fedlora_hf.aggregation.over_rounds import verdict as verdict_on
from fedlora_hf.numerics.clair.evidence import Judgement
from fedlora_hf.numerics.evidence import Evidence

IDS = ("bad", "good")
UNRELATED, QUIET, SILENT = Evidence(0.95, 0.85), Evidence(0.1, 1.7), Evidence(0.0, None)
LIKE_THE_CORE = Evidence(0.0, 0.85)


def flagged(*rounds: tuple[Evidence, bool]) -> bool:
    """Whether "bad" is flagged after these rounds of (evidence of its direction, whether it was flagged then), the last
    of them being judged now."""
    past = tuple(
        PastRound(
            {"bad": {"direction": found}, "good": {"direction": LIKE_THE_CORE}}, frozenset(["bad"] if was else [])
        )
        for found, was in rounds[:-1]
    )
    now, nothing = rounds[-1][0], torch.full((2,), torch.nan, dtype=torch.float64)
    scores = {"direction": torch.tensor([now.score, 0.0], dtype=torch.float64)}
    limit = torch.nan if now.threshold is None else now.threshold
    thresholds = {"direction": torch.full((2,), limit, dtype=torch.float64)}
    for kind in ("subspace", "scale"):
        scores[kind], thresholds[kind] = torch.zeros(2, dtype=torch.float64), nothing
    cohort: Any = SimpleNamespace(ids=IDS, past=past, functional={})
    verdict = verdict_on(cohort, Judgement(scores, thresholds, [], {}))
    assert not verdict[1]
    return bool(verdict[0])


@pytest.mark.parametrize("quiet", [QUIET, SILENT])
def test_rounds_that_could_not_have_flagged_an_unrelated_client_clear_nobody(quiet: Evidence) -> None:
    assert flagged((UNRELATED, True))
    assert flagged((UNRELATED, True), (quiet, True), (quiet, True), (quiet, True))


def test_rounds_that_could_have_seen_one_do() -> None:
    assert flagged((UNRELATED, True), (LIKE_THE_CORE, True))
    assert not flagged((UNRELATED, True), (LIKE_THE_CORE, True), (LIKE_THE_CORE, True))


def test_whoever_was_let_back_in_is_not_flagged_for_what_was() -> None:
    assert not flagged((UNRELATED, True), (LIKE_THE_CORE, False), (QUIET, True))
