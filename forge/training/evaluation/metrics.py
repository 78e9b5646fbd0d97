"""Generation metrics of the ``evaluate`` library, defined here so that nothing is fetched from the hub.

The library's package holds no metric: ``evaluate.load("rouge")`` downloads a script from the hub and executes it, and
needs a network for that each time its cache is empty. So these are subclasses of its ``Metric`` that compute what its
published scripts compute.
"""

from __future__ import annotations

import string
import tempfile
from typing import Any

import datasets
import evaluate

VARIANTS = ("rouge1", "rouge2", "rougeL")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _info(description: str, citation: str = "") -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description="",
        features=datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")}),
    )


class Rouge(evaluate.Metric):  # type: ignore[misc]
    """F-measures of ROUGE-1, -2 and -L (Lin 2004) by ``rouge_score``, as ``evaluate.load("rouge")`` has them.

    Words are runs of ASCII letters and digits, so text in other scripts scores 0.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "Overlap of word n-grams between an answer and a reference.",
            "Lin, C.-Y. (2004). ROUGE: A Package for Automatic Evaluation of Summaries.",
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(VARIANTS, use_stemmer=False)
        scores = [scorer.score(wanted, said) for said, wanted in zip(predictions, references, strict=True)]
        return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in VARIANTS}


class ExactMatch(evaluate.Metric):  # type: ignore[misc]
    """The share of equal pairs, as ``evaluate.load("exact_match")`` has it with ``ignore_case`` and
    ``ignore_punctuation`` (ASCII's). Blanks at either end do not count."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Share of answers that are the reference and nothing else.")

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        pairs = zip(predictions, references, strict=True)
        return {"exact_match": sum(_plain(said) == _plain(wanted) for said, wanted in pairs) / len(predictions)}


def _plain(text: str) -> str:
    return text.lower().translate(_NO_PUNCTUATION).strip()


def rouge(predictions: list[str], references: list[str]) -> dict[str, float]:
    """Mean F-measure (0 to 1) of each of :data:`VARIANTS` over at least one pair."""
    return _computed(Rouge, predictions, references)


def exact_match(predictions: list[str], references: list[str]) -> float:
    """The share (0 to 1) of at least one answer that is its reference, case and punctuation aside."""
    return _computed(ExactMatch, predictions, references)["exact_match"]


def _computed(metric: Any, predictions: list[str], references: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:  # the library insists on a cache directory, even in memory
        result = metric(keep_in_memory=True, cache_dir=scratch).compute(predictions=predictions, references=references)
    return {name: float(value) for name, value in result.items()}
