"""Evaluation: what base, adapter and merged model do on held-out documents. Written as ``evaluation.json``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from forge.training.system.command import say

if TYPE_CHECKING:
    from rich.console import Console


_WIDE = 76  # columns of a terminal that the table fits with its lines


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class DocumentResult(_Part):
    """``nats``: by subject, the sum of -ln p over the trained tokens. ``num_bytes``: of their text, UTF-8."""

    document: str
    num_tokens: int
    num_bytes: int
    nats: dict[str, float]


class SubjectResult(_Part):
    """One model's figures; ``None`` where not measured. ROUGE is a mean F-measure from 0 to 1."""

    subject: str
    nats_per_token: float | None = None
    bits_per_byte: float | None = None
    rouge1: float | None = None
    rouge2: float | None = None
    rouge_l: float | None = None
    num_facts_found: int | None = None
    seconds: float


class Comparison(_Part):
    """``subject`` minus ``reference`` in nats per token, paired over documents; below zero is better."""

    subject: str
    reference: str
    difference_nats_per_token: float
    standard_error_nats_per_token: float | None  # None: needs two documents
    num_documents: int
    num_documents_better: int


class DocumentAnswer(_Part):
    """A greedy answer to a document's instruction, and as many tokens of the document's beginning."""

    subject: str
    document: str
    answer: str
    reference: str


class FactAnswer(_Part):
    """A greedy answer to a fact's question; ``found``: it contains ``expected``."""

    subject: str
    question: str
    expected: str
    answer: str
    found: bool


class Evaluation(_Part):
    """One evaluation of one run. Digests are hex SHA-256 and name what was evaluated."""

    schema_version: int = 1
    subjects: list[SubjectResult]
    comparisons: list[Comparison]
    num_documents: int
    num_tokens: int
    num_bytes: int
    documents: list[DocumentResult]
    answers: list[DocumentAnswer]
    facts: list[FactAnswer]
    base_sha256: str
    adapter_sha256: str
    merged_sha256: str | None = None
    validation_examples_sha256: str | None = None
    questions_sha256: str | None = None  # facts, number and length of the answers, system prompt
    max_documents: int | None = None  # None: all
    device: str
    dtype: str
    environment: dict[str, Any] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)


def compare(documents: Sequence[DocumentResult], subject: str, reference: str) -> Comparison:
    """The difference of two subjects' token-weighted losses, with its standard error over documents.

    Both are ratios of sums over the same documents, so the error is the linearised one of a ratio
    with documents as clusters (Cochran 1977, Sampling Techniques, section 6.4): a document's tokens
    are not independent of one another.
    """
    changes = [row.nats[subject] - row.nats[reference] for row in documents]
    num_tokens = sum(row.num_tokens for row in documents)
    difference = sum(changes) / num_tokens
    error = None
    if len(documents) > 1:
        squares = sum((d - difference * row.num_tokens) ** 2 for d, row in zip(changes, documents, strict=True))
        error = math.sqrt(len(documents) / (len(documents) - 1) * squares) / num_tokens
    return Comparison(
        subject=subject,
        reference=reference,
        difference_nats_per_token=difference,
        standard_error_nats_per_token=error,
        num_documents=len(documents),
        num_documents_better=sum(change < 0 for change in changes),
    )


def describe_comparison(pair: Comparison) -> str:
    """The difference and its standard error, in words."""
    error = pair.standard_error_nats_per_token
    spread = "" if error is None else f" (standard error {error:.4f})"
    return f"{pair.subject} minus {pair.reference}: {pair.difference_nats_per_token:+.4f} nats per token{spread}"


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print the subjects' figures, their paired differences and the answers."""
    from rich import box
    from rich.table import Table

    counts = f"{evaluation.num_documents} held-out documents, {evaluation.num_tokens:,} tokens"
    lines = box.HEAVY_HEAD if console.width >= _WIDE else None  # else they take the room of the figures
    table = Table(title=f"evaluation: {counts}", title_justify="left", box=lines, pad_edge=lines is not None)
    table.add_column("", no_wrap=True)
    for name in ("nats/ token", "bits/ byte", "ROUGE-1", "ROUGE-2", "ROUGE-L", "facts"):
        table.add_column(name.replace(" ", "") if lines else name, justify="right")
    num_facts = len({row.question for row in evaluation.facts})
    for row in evaluation.subjects:
        facts = "-" if row.num_facts_found is None else f"{row.num_facts_found} of {num_facts}"
        losses = (_figure(row.nats_per_token, 4), _figure(row.bits_per_byte, 4))
        table.add_row(row.subject, *losses, *(_figure(v, 3) for v in (row.rouge1, row.rouge2, row.rouge_l)), facts)
    console.print(table)
    for pair in evaluation.comparisons:
        better = f"better on {pair.num_documents_better} of {pair.num_documents} documents"
        say(console, f"{describe_comparison(pair)}; {better}")
    for fact in evaluation.facts:
        answer = " ".join(fact.answer.split())
        verb = "says" if fact.found else "does not say"
        say(console, f"{fact.subject} {verb} {fact.expected!r}: {answer:.160}")
    for note in evaluation.notes:
        say(console, note, "note: ")


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
