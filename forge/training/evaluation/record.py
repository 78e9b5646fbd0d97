"""Evaluation: what base, adapter and merged model do on held-out documents. Written as ``evaluation.json``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from forge.training.system.command import say
from forge.training.system.errors import DataError
from forge.training.system.files import read_json_object

if TYPE_CHECKING:
    from rich.console import Console


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class DocumentResult(_Part):
    """``nats``: by subject, the sum of -ln p over the trained tokens. ``num_bytes``: of their text, UTF-8."""

    document: str
    num_tokens: int
    num_bytes: int
    nats: dict[str, float]


class SubjectResult(_Part):
    """One model's figures; ``None`` where not measured. ROUGE is a mean F-measure from 0 to 1.

    ``rouge*`` are of answers to held-out documents' instructions, ``facts_*`` of answers to facts against what is
    expected.
    """

    subject: str
    nats_per_token: float | None = None
    bits_per_byte: float | None = None
    general_nats_per_token: float | None = None
    rouge1: float | None = None
    rouge2: float | None = None
    rouge_l: float | None = None
    num_facts_found: int | None = None
    facts_exact_match: float | None = None
    facts_rouge_l: float | None = None
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
    """One evaluation of one run. Digests are hex SHA-256 and name what was evaluated.

    ``general_text``: the passages by which forgetting is measured; empty in files of schema 1, which had none.
    """

    schema_version: int = 2
    subjects: list[SubjectResult]
    comparisons: list[Comparison]
    num_documents: int
    num_tokens: int
    num_bytes: int
    documents: list[DocumentResult]
    general_text: list[DocumentResult] = Field(default_factory=list)
    general_comparisons: list[Comparison] = Field(default_factory=list)
    answers: list[DocumentAnswer]
    facts: list[FactAnswer]
    base_sha256: str
    adapter_sha256: str
    merged_sha256: str | None = None
    validation_examples_sha256: str | None = None
    questions_sha256: str | None = None  # facts, number and length of the answers, system prompt, general text
    max_documents: int | None = None  # None: all
    device: str
    dtype: str
    environment: dict[str, Any] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)


def load_evaluation(path: Path, *, remedy: str) -> Evaluation:
    """Read ``evaluation.json``. Raises :class:`DataError` with ``remedy`` where it is none."""
    try:
        return Evaluation.model_validate(read_json_object(path))
    except ValidationError as error:
        raise DataError(f"{path} is no evaluation that this Forge reads", remedy=remedy) from error
    except DataError as error:
        raise DataError(error.message, remedy=remedy) from error


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


# What a row of the table is called in a terminal and in a report, its field of SubjectResult, and its decimal places.
FIGURES = (
    ("held-out, nats per token", "nats_per_token", 4),
    ("held-out, bits per byte", "bits_per_byte", 4),
    ("general text, nats per token", "general_nats_per_token", 4),
    ("held-out answers, ROUGE-1", "rouge1", 3),
    ("held-out answers, ROUGE-2", "rouge2", 3),
    ("held-out answers, ROUGE-L", "rouge_l", 3),
    ("facts, exact match", "facts_exact_match", 3),
    ("facts, ROUGE-L", "facts_rouge_l", 3),
)


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print the subjects' figures, their paired differences and the answers."""
    from rich import box
    from rich.table import Table

    counts = f"{evaluation.num_documents} held-out documents, {evaluation.num_tokens:,} tokens"
    table = Table(title=f"evaluation: {counts}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold")
    for row in evaluation.subjects:
        table.add_column(row.subject, justify="right", no_wrap=True)
    for name, cells in figure_rows(evaluation):
        table.add_row(name, *cells)
    console.print(table)
    for pair in evaluation.comparisons:
        better = f"better on {pair.num_documents_better} of {pair.num_documents} documents"
        say(console, f"{describe_comparison(pair)}; {better}")
    for pair in evaluation.general_comparisons:
        better = f"better on {pair.num_documents_better} of {pair.num_documents} passages"
        say(console, f"on general text, {describe_comparison(pair)}; {better}")
    for fact in evaluation.facts:
        answer = " ".join(fact.answer.split())
        verb = "says" if fact.found else "does not say"
        say(console, f"{fact.subject} {verb} {fact.expected!r}: {answer:.160}")
    for note in evaluation.notes:
        say(console, note, "note: ")


def figure_rows(evaluation: Evaluation) -> list[tuple[str, list[str]]]:
    """A name and a cell per subject for every figure that at least one subject has."""
    rows = []
    for name, key, digits in FIGURES:
        values = [getattr(row, key) for row in evaluation.subjects]
        if any(value is not None for value in values):
            rows.append((name, ["-" if value is None else f"{value:.{digits}f}" for value in values]))
    if num_facts := len({row.question for row in evaluation.facts}):
        found = [row.num_facts_found for row in evaluation.subjects]
        rows.append(("facts found", ["-" if count is None else f"{count} of {num_facts}" for count in found]))
    return rows
