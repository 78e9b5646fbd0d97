"""ROUGE as a metric of the ``evaluate`` library, defined here so that nothing is fetched from the hub."""

from __future__ import annotations

import tempfile
from typing import Any

import datasets
import evaluate

VARIANTS = ("rouge1", "rouge2", "rougeL")


class Rouge(evaluate.Metric):  # type: ignore[misc]
    """F-measures of ROUGE-1, -2 and -L (Lin 2004) by ``rouge_score``, as ``evaluate.load("rouge")`` has them.

    Words are runs of ASCII letters and digits, so text in other scripts scores 0.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Overlap of word n-grams between an answer and a reference.",
            citation="Lin, C.-Y. (2004). ROUGE: A Package for Automatic Evaluation of Summaries.",
            inputs_description="",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(VARIANTS, use_stemmer=False)
        scores = [scorer.score(wanted, said) for said, wanted in zip(predictions, references, strict=True)]
        return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in VARIANTS}


def rouge(predictions: list[str], references: list[str]) -> dict[str, float]:
    """Mean F-measure (0 to 1) of each of :data:`VARIANTS` over at least one pair."""
    with tempfile.TemporaryDirectory() as scratch:  # the library insists on a cache directory, even in memory
        metric: Any = Rouge(keep_in_memory=True, cache_dir=scratch)
        result = metric.compute(predictions=predictions, references=references)
    return {name: float(result[name]) for name in VARIANTS}
