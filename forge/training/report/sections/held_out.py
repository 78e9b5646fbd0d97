"""Base, adapter and merged model on the documents that were held out, and on general text."""

from __future__ import annotations

from collections.abc import Sequence

from forge.training.evaluation.record import DocumentResult, describe_comparison, figure_rows
from forge.training.report.page.content import Part, Row, Section, Table
from forge.training.report.run_files import RunFiles


def build(files: RunFiles) -> Section:
    """Empty where the run was not evaluated. A figure that no model has is left out."""
    evaluation = files.evaluation
    if evaluation is None:
        return Section("held-out", "Held-out documents")
    subjects = [row.subject for row in evaluation.subjects]
    figures = figure_rows(evaluation)
    better = "Less loss is better" + (", and more ROUGE" if any("ROUGE" in name for name, _ in figures) else "")
    caption = better if any("nats" in name for name, _ in figures) else "Facts found in the answers"
    rows = [Row((name[0].upper() + name[1:], *cells)) for name, cells in figures]
    parts: list[Part] = [Table(caption, ("", *subjects), tuple(rows))]
    if evaluation.documents:
        parts.append(_by_document("By document, nats per token", "Document", evaluation.documents, subjects))
    if evaluation.general_text:
        parts.append(_by_document("General text, nats per token", "Passage", evaluation.general_text, subjects))
    intro = f"{evaluation.num_documents:,} documents of {evaluation.num_tokens:,} tokens that were not trained on, "
    intro += f"measured in {evaluation.dtype} on {evaluation.device}."
    compared = [f"{describe_comparison(pair)}." for pair in evaluation.comparisons]
    compared += [f"On general text, {describe_comparison(pair)}." for pair in evaluation.general_comparisons]
    return Section(
        "held-out",
        "Held-out documents",
        intro if evaluation.documents else "",
        tuple(parts),
        (*compared, *evaluation.notes),
    )


def _by_document(caption: str, kind: str, documents: Sequence[DocumentResult], subjects: Sequence[str]) -> Table:
    rows = [
        Row((row.document, f"{row.num_tokens:,}", *(f"{row.nats[s] / row.num_tokens:.4f}" for s in subjects)))
        for row in documents
    ]
    return Table(caption, (kind, "Tokens", *subjects), tuple(rows), is_folded=True)
