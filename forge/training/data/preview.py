"""What would be trained, before it is: counts, lengths, what is cut, what is masked."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from forge.training.config.workload import Workload
from forge.training.data.batching import num_steps
from forge.training.data.conversation import IGNORED, Encoder
from forge.training.data.examples import Examples, encode_records
from forge.training.data.inputs import corpus_paths, describe_overlap, find_overlap
from forge.training.data.records import read_both, several
from forge.training.models.tokenizers import load_tokenizer
from forge.training.system.command import rows_table

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Span:
    """A stretch of decoded text that is trained, or masked."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Preview:
    """Token counts are of the examples as they would be trained. Histogram bounds are in tokens."""

    workload: str
    documents: list[str]  # what became of them where the config names a folder
    num_train_documents: int
    num_train_examples: int
    num_validation_examples: int
    num_tokens: int
    num_trained_tokens: int
    num_steps: int
    num_cut: int
    share_of_tokens_cut: float
    num_divided: int
    num_parts: int
    num_with_control_tokens: int
    dropped: list[str]  # records with nothing to train, or with control tokens where those are dropped
    longest: int
    median: float
    histogram: list[tuple[int, int]]  # (upper bound, examples)
    overlap: list[str]  # held-out texts that are trained too, or nearly
    shown: list[tuple[str, list[Span]]]


def preview_workload(workload: Workload, base_dir: Path, *, num_examples: int = 3) -> Preview:
    """Encode a config's data without keeping it. Raises the errors that training would."""
    tokenizer = load_tokenizer(base_dir)
    encoder = Encoder(tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        train_path, validation_path, documents = corpus_paths(workload, Path(scratch))
        records, held_out = read_both(train_path, validation_path)
    train = encode_records(records, encoder, workload.data, train_path)
    validation = encode_records(held_out, encoder, workload.data, str(validation_path)) if held_out else None
    report, lengths = train.report, np.array(train.report.lengths)
    before = report.num_tokens + report.num_tokens_cut
    return Preview(
        workload=workload.name,
        documents=documents,
        num_train_documents=report.num_records,
        num_train_examples=len(train),
        num_validation_examples=len(validation) if validation else 0,
        num_tokens=report.num_tokens,
        num_trained_tokens=report.num_trained_tokens,
        num_steps=num_steps(workload, len(train)),
        num_cut=report.num_cut,
        share_of_tokens_cut=report.num_tokens_cut / before,
        num_divided=report.num_divided,
        num_parts=report.num_parts,
        num_with_control_tokens=report.num_with_control_tokens,
        dropped=report.dropped,
        longest=int(lengths.max()),
        median=float(np.median(lengths)),
        histogram=_histogram(lengths),
        overlap=describe_overlap(find_overlap(records, held_out)) if held_out else [],
        shown=[(train.document_ids[i], _spans(train, i, tokenizer)) for i in range(min(num_examples, len(train)))],
    )


def _histogram(lengths: np.ndarray) -> list[tuple[int, int]]:
    bounds = [64 << k for k in range(12)]
    edges = [0, *bounds, 1 << 62]
    counts = np.histogram(lengths, bins=edges)[0]
    last = int(np.nonzero(counts)[0].max())
    return [(edges[i + 1], int(counts[i])) for i in range(last + 1)]


def _spans(examples: Examples, index: int, tokenizer: Any) -> list[Span]:
    ids, trained = examples.input_ids[index], examples.labels[index] != IGNORED
    borders = [0, *(np.nonzero(np.diff(trained.astype(np.int8)))[0] + 1).tolist(), len(ids)]
    return [Span(tokenizer.decode(ids[a:b].tolist()), bool(trained[a])) for a, b in pairwise(borders)]


def print_preview(preview: Preview, console: Console) -> None:
    """Print the counts, the histogram and the decoded examples, masked text dimmed and bracketed."""
    from rich.text import Text

    rows = [("corpus", line) for line in preview.documents]
    rows += [
        ("documents", f"{preview.num_train_documents:,} -> {preview.num_train_examples:,} examples"),
        ("validation", f"{preview.num_validation_examples:,} examples"),
        ("tokens", f"{preview.num_tokens:,}, trained {preview.num_trained_tokens:,}"),
        ("steps", f"{preview.num_steps:,}"),
        ("length", f"median {preview.median:,.0f}, longest {preview.longest:,} tokens"),
        ("cut", f"{preview.num_cut:,} documents, {preview.share_of_tokens_cut:.1%} of all tokens lost"),
        ("divided", f"{preview.num_divided:,} documents into {preview.num_parts:,} parts, nothing lost"),
        ("control tokens as text", f"{preview.num_with_control_tokens:,} documents"),
    ]
    names = f": {several(preview.dropped, most=10)}" if preview.dropped else ""
    rows.append(("nothing to train", f"{len(preview.dropped):,} records{names}"))
    rows.append(("both held out and trained", "\n".join(preview.overlap) or "none"))
    console.print(rows_table(f"preview: {preview.workload}", rows))
    most = max(count for _, count in preview.histogram)
    console.print("examples by length in tokens")
    for bound, count in preview.histogram:
        console.print(f"  < {bound:>7,}  {count:>6,}  {'#' * round(40 * count / most)}")
    for name, spans in preview.shown:
        console.print(f"\n--- {name}: [masked text in brackets], the rest is trained", markup=False)
        shown = Text()
        for span in spans:
            text = span.text if len(span.text) <= 600 else f"{span.text[:400]}\n ... \n{span.text[-200:]}"
            shown.append(text if span.trained else f"[{text}]", style="" if span.trained else "dim")
        console.print(shown)
