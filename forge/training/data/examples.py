"""Records become token ids and labels: once, hashed, shared by every backend.

Labels are token ids where a token is trained and -100 elsewhere, aligned with the ids (the model
shifts them, as in ``transformers``).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from forge.training.config.workload import DataSection
from forge.training.data.conversation import IGNORED, Encoder, UnrepresentableError, encode_conversation
from forge.training.data.records import Message, Record, bad_lines
from forge.training.data.rows import Unit
from forge.training.system.errors import DataError
from forge.training.system.files import staged_directory, write_json

_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")
_HEADING = re.compile(r"^ {0,3}#{1,6}(\s|$)")
MIN_ANSWER_TOKENS = 32  # a part shorter than this is not worth its prompt
_MOST_LISTED = 100  # of the records that the chat template cannot hold
_QUESTION_CHARACTERS = 120


@dataclass(frozen=True)
class ExamplesReport:
    """What became of the records. Lengths are in tokens, before cutting or dividing."""

    num_records: int
    num_examples: int
    num_tokens: int
    num_trained_tokens: int
    num_cut: int  # examples cut at max_length
    num_tokens_cut: int
    num_divided: int  # documents divided into parts
    num_parts: int
    num_with_control_tokens: int
    dropped: list[str]  # by name: nothing left to train on, or control tokens with policy "drop"
    lengths: list[int]  # of the examples, after cutting or dividing
    left_out: list[str] = field(default_factory=list)  # line, reason, question: the chat template cannot hold it


@dataclass(frozen=True)
class Examples:
    """``input_ids`` and ``labels``: one int32 array of shape (length,) per example."""

    input_ids: list[np.ndarray]
    labels: list[np.ndarray]
    document_ids: list[str]
    sha256: str
    report: ExamplesReport

    def __len__(self) -> int:
        return len(self.input_ids)


def encode_records(
    records: Sequence[Record], encoder: Encoder, data: DataSection, source: Path | str = "the records"
) -> Examples:
    """Encode records under a config's data settings. ``source``: their file, for messages.

    Raises :class:`DataError` naming every record that cannot be encoded, or if nothing is left.
    """
    rows: list[tuple[np.ndarray, np.ndarray, str]] = []
    errors: list[str] = []
    odd: list[str] = []
    dropped: list[str] = []
    cut = tokens_cut = divided = parts = with_control = 0
    for record in records:
        messages = list(record.messages)
        if data.system_prompt is not None and messages[0].role != "system":
            messages.insert(0, Message("system", data.system_prompt))
        name = record.place
        try:
            ids, labels, contaminated = encode_conversation(encoder, messages, data.loss_on)
            pieces = None
            if len(ids) > data.max_length and data.long_documents == "divide" and record.document:
                pieces = _divided(encoder, messages, data)
        except UnrepresentableError as error:
            odd.append(f"{name}: {error.message}; it answers {_question(record)!r}")
            continue
        except DataError as error:
            errors.append(f"{name}: {error.message}")
            continue
        if contaminated:
            with_control += 1
            if data.control_tokens == "fail":
                token = next(t for t in encoder.control if any(t in m.content for m in messages))
                errors.append(f"{name}: the text holds the control token {token}, and data.control_tokens is fail")
                continue
            if data.control_tokens == "drop":
                dropped.append(name)
                continue
        if pieces is not None:
            divided += 1
            parts += len(pieces)
            rows += [(i, lab, f"{name} part {k}/{len(pieces)}") for k, (i, lab) in enumerate(pieces, 1)]
            continue
        if len(ids) > data.max_length:
            cut += 1
            tokens_cut += len(ids) - data.max_length
            ids, labels = ids[: data.max_length], labels[: data.max_length]
        rows.append((ids, labels, name))
    unit: Unit = records[0].unit if records else "line"
    _refuse(source, errors, odd, data, unit)
    has_loss = [bool((labels[1:] != IGNORED).any()) for _, labels, _ in rows]  # the first token is never predicted
    kept = [row for row, has in zip(rows, has_loss, strict=True) if has]
    dropped += [row[2] for row, has in zip(rows, has_loss, strict=True) if not has]
    if odd and not rows:
        raise bad_lines(
            source, odd, unit, most=_MOST_LISTED, remedy="no record is left: use another base, or other records"
        )
    if not kept:
        raise DataError(
            f"{source}: none of {len(records)} records has a token to train within data.max_length={data.max_length}",
            remedy="raise data.max_length or shorten the instructions",
        )
    all_ids, all_labels = [row[0] for row in kept], [row[1] for row in kept]
    return Examples(
        input_ids=all_ids,
        labels=all_labels,
        document_ids=[row[2] for row in kept],
        sha256=_digest(all_ids, all_labels),
        report=ExamplesReport(
            num_records=len(records),
            num_examples=len(kept),
            num_tokens=sum(map(len, all_ids)),
            num_trained_tokens=sum(int((row != IGNORED).sum()) for row in all_labels),
            num_cut=cut,
            num_tokens_cut=tokens_cut,
            num_divided=divided,
            num_parts=parts,
            num_with_control_tokens=with_control,
            dropped=dropped,
            lengths=list(map(len, all_ids)),
            left_out=odd,
        ),
    )


def _refuse(source: Path | str, errors: list[str], odd: list[str], data: DataSection, unit: Unit) -> None:
    """Raise one :class:`DataError` for ``errors``, and for the records in ``odd`` unless they may be left out."""
    found: list[DataError] = []
    if errors:
        found.append(bad_lines(source, errors, unit))
    if odd and data.on_unrepresentable == "error":
        remedy = "correct them, or train without them: --set data.on_unrepresentable=leave_out"
        found.append(bad_lines(source, odd, unit, most=_MOST_LISTED, remedy=remedy))
    if found:
        raise DataError(
            "\n".join(error.message for error in found), remedy="; ".join(str(error.remedy) for error in found)
        )


def document_name(example: str) -> str:
    """The name of an example's document: the parts of a divided one share it."""
    return example.partition(" part ")[0]


def _question(record: Record) -> str:
    """What a record answers, shortened: `dataset` has written the document's path into it."""
    text = " ".join(next(m.content for m in record.messages if m.role == "user").split())
    half = _QUESTION_CHARACTERS // 2
    return text if len(text) <= _QUESTION_CHARACTERS else f"{text[:half]} ... {text[-half:]}"


def describe_left_out(source: str, report: ExamplesReport) -> list[str]:
    """One text that lists the records left out because the chat template cannot hold them, where there are any."""
    if not report.left_out:
        return []
    lines = report.left_out[:_MOST_LISTED]
    more = len(report.left_out) - len(lines)
    listed = "".join(f"\n  {line}" for line in lines) + (f"\n  and {more:,} more" if more else "")
    count = f"{len(report.left_out):,} of {report.num_records:,} records"
    return [f"{source}: {count} left out, which the chat template cannot hold (data.on_unrepresentable):{listed}"]


def _divided(encoder: Encoder, messages: Sequence[Message], data: DataSection) -> list[tuple[np.ndarray, np.ndarray]]:
    """Divide a document so that every part fits with its prompt; every character is in one part."""
    *prompt, answer = messages
    question = prompt[-1]

    def encode(text: str, part: int, of: int) -> tuple[np.ndarray, np.ndarray]:
        numbered = Message(question.role, f"{question.content} (part {part} of {of})")
        conversation = [*prompt[:-1], numbered, Message(answer.role, text)]
        return encode_conversation(encoder, conversation, data.loss_on)[:2]

    overhead = len(encode("", 999, 999)[0]) + 1
    budget = data.max_length - overhead
    while budget >= MIN_ANSWER_TOKENS:
        texts = divide(answer.content, encoder.ids_and_ends(answer.content, plain=True)[1], budget)
        pieces = [encode(text, index, len(texts)) for index, text in enumerate(texts, 1)]
        excess = max(len(ids) for ids, _ in pieces) - data.max_length
        if excess <= 0:
            return pieces
        budget -= excess  # a part can need a token or two more by itself than inside its document
    least = overhead + MIN_ANSWER_TOKENS
    raise DataError(
        f"data.max_length={data.max_length} leaves no tokens for an answer: its prompt takes {overhead} tokens; "
        f"set it to at least {least}, or data.long_documents to cut"
    )


def borders(text: str) -> tuple[list[int], list[int], list[int]]:
    """Character positions at which headings, paragraphs and lines begin, each ascending.

    Headings and blank lines inside fenced code do not count; its lines do.
    """
    headings, paragraphs, lines = [], [], []
    position, fence, after_blank = 0, "", False
    for line in text.splitlines(keepends=True):
        if position:
            lines.append(position)
        opened = _FENCE.match(line)
        if not fence and position:
            if _HEADING.match(line):
                headings.append(position)
            if after_blank and line.strip():
                paragraphs.append(position)
        if opened:
            mark = opened.group(1)
            if not fence:
                fence = mark
            elif mark[0] == fence[0] and len(mark) >= len(fence) and not line.strip().strip(mark[0]):
                fence = ""
        after_blank = not line.strip()
        position += len(line)
    return headings, paragraphs, lines


def divide(text: str, token_starts: np.ndarray, max_tokens: int) -> list[str]:
    """Divide ``text`` into consecutive parts of at most ``max_tokens`` of its tokens.

    ``token_starts``: each token's first character, ascending, int64 of shape (tokens,). A part
    ends at the last heading in its second half; where there is none, at the last paragraph, then
    line, in its last three quarters; else at a token. Joining the parts gives ``text``.
    """
    marks = [np.asarray(kind, dtype=np.int64) for kind in borders(text)]
    shares = (0.5, 0.25, 0.25)
    parts, begin = [], 0
    while True:
        first = int(np.searchsorted(token_starts, begin, side="left"))
        if len(token_starts) - first <= max_tokens:
            parts.append(text[begin:])
            return parts
        limit = int(token_starts[first + max_tokens])
        end = 0
        for kind, share in zip(marks, shares, strict=True):
            earliest = int(token_starts[first + int(max_tokens * share)])
            index = int(np.searchsorted(kind, limit, side="right")) - 1
            if index >= 0 and kind[index] >= max(earliest, begin + 1):
                end = int(kind[index])
                break
        if not end:
            end = limit
            if end <= begin:  # one character of more tokens than fit: take it whole
                end = begin + 1
        parts.append(text[begin:end])
        begin = end


def _digest(input_ids: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for ids, labs in zip(input_ids, labels, strict=True):
        digest.update(np.int64(len(ids)).tobytes() + ids.tobytes() + labs.tobytes())
    return digest.hexdigest()


def sample_examples(examples: Examples, size: int) -> Examples:
    """``size`` examples that stand for all: the longest, and an even spread over the others by length.

    The others are ranked by length, cut into ``size - 1`` strata of equal number, and the middle of
    each is taken (systematic sampling); their order stays that of the corpus. Raises
    :class:`DataError` where there are fewer than ``size``.
    """
    if size > len(examples):
        raise DataError(
            f"data.sample={size}, and there are {len(examples)} examples",
            remedy=f"set data.sample to at most {len(examples)}, or leave it out",
        )
    ranked = sorted(range(len(examples)), key=lambda i: (-len(examples.input_ids[i]), i))
    longest, others = ranked[0], ranked[1:]
    middles = [others[(2 * k + 1) * len(others) // (2 * (size - 1))] for k in range(size - 1)]
    chosen = sorted([longest, *middles])
    ids, labels = [examples.input_ids[i] for i in chosen], [examples.labels[i] for i in chosen]
    return Examples(
        input_ids=ids,
        labels=labels,
        document_ids=[examples.document_ids[i] for i in chosen],
        sha256=_digest(ids, labels),
        report=replace(
            examples.report,
            num_examples=size,
            num_tokens=sum(map(len, ids)),
            num_trained_tokens=sum(int((row != IGNORED).sum()) for row in labels),
            lengths=list(map(len, ids)),
        ),
    )


def save_examples(examples: Examples, directory: Path, *, force: bool = False) -> None:
    """Write ``examples.safetensors`` (ids, labels, offsets) and ``examples.json`` beside it."""
    from safetensors.numpy import save_file

    offsets = np.cumsum([0, *(len(ids) for ids in examples.input_ids)]).astype(np.int64)
    with staged_directory(directory, force=force) as staging:
        tensors = {
            "input_ids": np.concatenate(examples.input_ids),
            "labels": np.concatenate(examples.labels),
            "offsets": offsets,
        }
        save_file(tensors, staging / "examples.safetensors")
        (staging / "examples.safetensors").chmod(0o644)
        meta = {"sha256": examples.sha256, "document_ids": examples.document_ids, "report": asdict(examples.report)}
        write_json(staging / "examples.json", meta)


def load_examples(directory: Path | str) -> Examples:
    """Read what :func:`save_examples` wrote. Raises :class:`DataError` if absent or changed."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    directory = Path(directory)
    try:
        meta = json.loads((directory / "examples.json").read_text(encoding="utf-8"))
        tensors = load_file(directory / "examples.safetensors")
        bounds = tensors["offsets"]
        spans = list(pairwise(bounds))
        ids = [tensors["input_ids"][a:b] for a, b in spans]
        labels = [tensors["labels"][a:b] for a, b in spans]
        report = ExamplesReport(**meta["report"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DataError(f"{directory} holds no readable examples: {error}") from error
    if _digest(ids, labels) != meta["sha256"]:
        raise DataError(f"{directory}: the examples are not those that were written (digest differs)")
    return Examples(ids, labels, list(meta["document_ids"]), meta["sha256"], report)
