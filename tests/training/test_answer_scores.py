"""Answers are scored as Super-NaturalInstructions scores them: normalised exact match, ROUGE-L with stems, the best of
the accepted answers."""
# SPDX-License-Identifier: Apache-2.0

import pytest

from fedlora_hf.training.answers import answer_metrics, exact_matches, normalised, rouge_ls


def test_case_punctuation_and_spaces_do_not_count() -> None:
    assert normalised("  The  Cat,\nsat! ") == "the cat sat"
    assert exact_matches(["E.", "e", "no", ""], [["e"], ["E!", "N"], ["yes", "nope"], ["."]]) == [1.0, 1.0, 0.0, 1.0]
    # Articles stay: only SQuAD leaves them out.
    assert exact_matches(["the cat"], [["cat"]]) == [0.0]


def test_rouge_l_takes_the_best_reference_and_knows_stems() -> None:
    assert rouge_ls(["the cat sat"], [["the cat sat"]]) == [1.0]
    # Longest common subsequence of 2 of 3 words: precision 2/3 and recall 2/2 give F1 0.8.
    assert rouge_ls(["the cat sat"], [["a dog", "the cat", "sat"]]) == pytest.approx([0.8])
    assert rouge_ls(["", "he was running"], [["a"], ["he was runs"]]) == pytest.approx([0.0, 1.0])


def test_means_are_over_answers() -> None:
    found = answer_metrics(["the cat sat", "nothing alike"], [["The cat sat.", "x"], ["y"]])
    assert found == pytest.approx({"exact_match": 0.5, "rouge_l": 0.5})
    assert answer_metrics([], []) == {}
