"""How good generated answers are, as Super-NaturalInstructions scores them: exact match and ROUGE-L.

Wang et al. 2022 (arXiv 2204.07705): ROUGE-L for all tasks, exact match for classification; the best of the accepted
answers counts.
"""
# SPDX-License-Identifier: Apache-2.0

import string
from collections.abc import Sequence
from functools import cache
from typing import Any

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation, one space between words."""
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def exact_matches(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """One number a prediction: 1.0 where it is an accepted answer once both are `normalised`, else 0.0."""
    pairs = zip(predictions, references, strict=True)
    return [float(normalised(said) in {normalised(answer) for answer in accepted}) for said, accepted in pairs]


def rouge_ls(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """One number a prediction, 0 to 1: ROUGE-L F1 (Lin 2004, by rouge_score with its stemmer) against the best of the
    accepted answers."""
    scorer = _scorer()
    return [
        max(scorer.score(answer, said)["rougeL"].fmeasure for answer in accepted)
        for said, accepted in zip(predictions, references, strict=True)
    ]


def answer_metrics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """{"exact_match", "rouge_l"}: means over the predictions, 0 to 1; {} without any."""
    if not predictions:
        return {}
    return dict(_metric().compute(predictions=list(predictions), references=[list(r) for r in references]))


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


@cache
def _metric() -> Any:
    """Both as an `evaluate.Metric` of our own, because `evaluate.load` fetches a script when it runs."""
    import datasets
    import evaluate

    class Answers(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            text = datasets.Value("string")
            features = datasets.Features({"predictions": text, "references": datasets.Sequence(text)})
            return evaluate.MetricInfo(
                description="Exact match and ROUGE-L F1 against the best reference",
                citation="Wang et al. 2022",
                inputs_description="",
                features=features,
            )

        def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
            found = {
                "exact_match": exact_matches(predictions, references),
                "rouge_l": rouge_ls(predictions, references),
            }
            return {name: sum(values) / len(values) for name, values in found.items()}

    return Answers(keep_in_memory=True)
