"""Base, adapter and merged model on the documents that were held out."""

from __future__ import annotations

from forge.training.evaluation.record import describe_comparison
from forge.training.report.page.content import Part, Row, Section, Table
from forge.training.report.page.numbers import NONE
from forge.training.report.run_files import RunFiles

_FIGURES = (
    ("Nats per token", "nats_per_token", 4),
    ("Bits per byte", "bits_per_byte", 4),
    ("ROUGE-1", "rouge1", 3),
    ("ROUGE-2", "rouge2", 3),
    ("ROUGE-L", "rouge_l", 3),
)


def build(files: RunFiles) -> Section:
    """Empty where the run was not evaluated. A column that no model has a figure for is left out."""
    evaluation = files.evaluation
    if evaluation is None:
        return Section("held-out", "Held-out documents")
    known = [f for f in _FIGURES if any(getattr(row, f[1]) is not None for row in evaluation.subjects)]
    num_facts = len({row.question for row in evaluation.facts})
    rows = []
    for subject in evaluation.subjects:
        values = [(getattr(subject, name), digits) for _, name, digits in known]
        cells = [subject.subject, *(NONE if value is None else f"{value:.{digits}f}" for value, digits in values)]
        if num_facts:
            cells.append(NONE if subject.num_facts_found is None else f"{subject.num_facts_found} of {num_facts}")
        rows.append(Row(tuple(cells)))
    columns = ("Model", *(title for title, *_ in known), *(("Facts",) if num_facts else ()))
    better = "Less loss is better" + (", and more ROUGE" if any("ROUGE" in title for title, *_ in known) else "")
    caption = better if known else "Facts found in the answers"
    parts: list[Part] = [Table(caption, columns, tuple(rows))]
    subjects = [row.subject for row in evaluation.subjects]
    if evaluation.documents:
        by_document = [
            Row((row.document, f"{row.num_tokens:,}", *(f"{row.nats[s] / row.num_tokens:.4f}" for s in subjects)))
            for row in evaluation.documents
        ]
        columns = ("Document", "Tokens", *subjects)
        parts.append(Table("By document, nats per token", columns, tuple(by_document), is_folded=True))
    intro = f"{evaluation.num_documents:,} documents of {evaluation.num_tokens:,} tokens that were not trained on, "
    intro += f"measured in {evaluation.dtype} on {evaluation.device}."
    compared = tuple(f"{describe_comparison(pair)}." for pair in evaluation.comparisons)
    return Section(
        "held-out",
        "Held-out documents",
        intro if evaluation.documents else "",
        tuple(parts),
        (*compared, *evaluation.notes),
    )
