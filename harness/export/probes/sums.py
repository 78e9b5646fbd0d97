"""Sums by document, and the means and standard errors that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, field

from forge.training.evaluation.record import DocumentResult, compare
from harness.export.answers import Pair, Step


@dataclass
class Tally:
    """Sums by document, in the order of the documents. ``largest``: of one prediction, by pair."""

    tokens: dict[str, int] = field(default_factory=dict)
    sums: dict[str, dict[str, float]] = field(default_factory=dict)  # name -> document -> sum
    largest: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, document: str, amount: float) -> None:
        """Add to a document's sum under a name."""
        rows = self.sums.setdefault(name, {})
        rows[document] = rows.get(document, 0.0) + amount

    def mean(self, name: str, less: str | None = None) -> tuple[float, float | None]:
        """Mean per token and its standard error over documents; with ``less``, of the paired difference."""
        rows = [
            DocumentResult(
                document=document,
                num_tokens=num_tokens,
                num_bytes=0,
                nats={name: self.sums[name][document], "": self.sums[less][document] if less else 0.0},
            )
            for document, num_tokens in self.tokens.items()
        ]
        paired = compare(rows, name, "")
        return paired.difference_nats_per_token, paired.standard_error_nats_per_token


def describe_pair(tally: Tally, name: str) -> Pair:
    """The divergences added under ``reference || subject`` and ``top of reference || subject``, in nats per token."""
    reference, _, subject = name.partition(" || ")
    mean, error = tally.mean(name)
    return {
        "reference": reference,
        "subject": subject,
        "mean_kl_nats": mean,
        "standard_error_nats": error,
        "largest_kl_nats": tally.largest[name],
        "same_top_share": tally.mean(f"top of {name}")[0],
    }


def describe_chain(tally: Tally, subjects: list[str]) -> list[Step]:
    """Each subject's loss and its paired change from the one before, in nats per token."""
    rows: list[Step] = []
    for before, subject in zip([None, *subjects], subjects, strict=False):
        change, error = tally.mean(subject, before) if before else (None, None)
        rows.append(
            {
                "subject": subject,
                "nats_per_token": tally.mean(subject)[0],
                "change_nats_per_token": change,
                "standard_error_nats_per_token": error,
            }
        )
    return rows
