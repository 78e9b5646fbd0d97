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
from forge.training.data.conversation import IGNORED, load_encoder
from forge.training.data.examples import Examples, describe_left_out, document_name
from forge.training.data.inputs import corpus_paths, describe_overlap, encode_corpus
from forge.training.data.records import several
from forge.training.system.command import rows_table

if TYPE_CHECKING:
    from rich.console import Console


_MOST_SHOWN, _FIRST_SHOWN, _LAST_SHOWN = 600, 400, 200  # characters of a span


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
    template_remarks: list[str]  # what is unusual about the chat template
    left_out: list[str]  # records that the chat template cannot hold
    dropped: list[str]  # records with nothing to train, or with control tokens where those are dropped
    longest: int
    median: float
    histogram: list[tuple[int, int]]  # (upper bound, examples)
    overlap: list[str]  # held-out texts that are trained too, or nearly
    shown: list[tuple[str, list[Span]]]


def preview_workload(workload: Workload, base_dir: Path, *, num_examples: int = 3) -> Preview:
    """Encode a config's data without keeping it. Raises the errors that training would."""
    encoder = load_encoder(base_dir)
    with tempfile.TemporaryDirectory() as scratch:
        train_path, validation_path, documents = corpus_paths(workload, Path(scratch))
        encoded = encode_corpus(workload, encoder, train_path, validation_path)
    sides, train, validation = encoded.sides, encoded.train, encoded.validation
    left_out = describe_left_out(train_path.name, train.report)
    if validation is not None:
        left_out += describe_left_out((validation_path or train_path).name, validation.report)
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
        template_remarks=list(encoder.remarks),
        left_out=left_out,
        dropped=report.dropped,
        longest=int(lengths.max()),
        median=float(np.median(lengths)),
        histogram=_histogram(lengths),
        overlap=describe_overlap(sides.train, sides.held_out) if sides.held_out else [],
        shown=[(train.document_ids[i], _spans(train, i, encoder.tokenizer)) for i in _spread(train, num_examples)],
    )


def _spread(examples: Examples, num_examples: int) -> list[int]:
    """Examples of as many documents, evenly spread over the corpus: of a divided one its first part."""
    first: dict[str, int] = {}
    for index, name in enumerate(examples.document_ids):
        first.setdefault(document_name(name), index)
    documents = list(first.values())
    num_shown = min(num_examples, len(documents))
    return [documents[(2 * k + 1) * len(documents) // (2 * num_shown)] for k in range(num_shown)]


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
    """Print the counts, the histogram and the decoded examples, every line marked as masked or trained."""
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
    rows.append(("chat template", "\n".join(preview.template_remarks) or "trained as it is asked"))
    rows.append(("left out", "\n".join(preview.left_out) or "none"))
    rows.append(("nothing to train", f"{len(preview.dropped):,} records{names}"))
    rows.append(("both held out and trained", "\n".join(preview.overlap) or "none"))
    console.print(rows_table(f"preview: {preview.workload}", rows))
    most = max(count for _, count in preview.histogram)
    console.print("examples by length in tokens")
    for bound, count in preview.histogram:
        console.print(f"  < {bound:>7,}  {count:>6,}  {'#' * round(40 * count / most)}")
    for name, spans in preview.shown:
        console.print(f"\n--- {name}", markup=False)
        for span in spans:
            _print_span(span, console)


def _print_span(span: Span, console: Console) -> None:
    """Its lines behind ``trained |`` or ``masked  |``, rows of a line that wraps too: no text can look like a mark."""
    from rich.text import Text

    mark, style = ("trained | ", "") if span.trained else ("masked  | ", "dim")
    texts = [span.text]
    if len(span.text) > _MOST_SHOWN:
        texts = [span.text[:_FIRST_SHOWN], span.text[-_LAST_SHOWN:]]
    for number, text in enumerate(texts):
        if number:
            num_more = len(span.text) - _FIRST_SHOWN - _LAST_SHOWN
            console.print(f"        ... {num_more:,} characters more ...", style=style)
        for line in text.removesuffix("\n").expandtabs().split("\n"):
            shown = Text("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))
            for row in shown.wrap(console, max(20, console.width - len(mark)), overflow="fold") or [Text()]:
                console.print(Text(mark) + row, style=style, overflow="ignore", no_wrap=True, crop=False)
