"""From a config's data section to the two sets of examples a run trains and is judged on, and what stands in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from forge.training.config.workload import DataSection, Workload
from forge.training.data.conversation import Encoder, UnrepresentableError, encode_question, load_encoder
from forge.training.data.duplicates import DUPLICATE_SIMILARITY, similar_pairs
from forge.training.data.examples import (
    Examples,
    describe_left_out,
    encode_records,
    sample_examples,
    save_examples,
)
from forge.training.data.records import Message, Record, of_both, read_both, several
from forge.training.models.digests import base_sha256, tokenizer_sha256
from forge.training.system.command import shown_path
from forge.training.system.errors import ConfigurationError, DataError
from forge.training.system.files import read_json_object, sha256_file


class Inputs(BaseModel):
    """What went in, by content: part of the run record. Every digest is a hex SHA-256."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    base_sha256: str
    tokenizer_sha256: str
    corpus_sha256: str | None = None
    validation_corpus_sha256: str | None = None
    train_examples_sha256: str
    validation_examples_sha256: str | None = None
    num_train_records: int | None = None
    num_divided_records: int | None = None  # of those, longer than data.max_length and trained as several examples
    num_train_examples: int
    num_validation_examples: int
    num_train_tokens: int  # of the examples, once, not times the epochs
    num_trained_tokens: int  # of those, tokens that carry a loss
    # of all examples before data.sample, to project a whole run's time from a sample's
    num_corpus_examples: int | None = None
    num_corpus_tokens: int | None = None
    corpus_tokens_squared: int | None = None  # sum over examples of tokens^2: attention's share
    template_date: str | None = None  # ISO 8601, what the chat template writes as today's date, if it writes one
    # what is unusual about the chat template, documents and records left out and why, records with nothing to train,
    # texts on both sides of the split
    notes: list[str] = Field(default_factory=list)


@dataclass(frozen=True)
class PreparedInputs:
    """Examples and their description for the run record. ``validation`` is ``None`` where there is none."""

    train: Examples
    validation: Examples | None
    described: Inputs


@dataclass(frozen=True)
class Sides:
    """The records to train on and those held out; ``remark``: how they were parted, where a share was asked for."""

    train: list[Record]
    held_out: list[Record] | None
    remark: str | None = None


@dataclass(frozen=True)
class EncodedCorpus:
    """Both sides of a corpus, as records and as examples before ``data.sample``; ``None`` where nothing is held out."""

    sides: Sides
    train: Examples
    validation: Examples | None


@dataclass(frozen=True)
class Overlap:
    """A held-out record whose answer is trained, and the trained record that is most like it.

    ``similarity``: Jaccard's, of 5-word shingles, from 0.8 to 1. ``is_equal``: blanks and line ends apart.
    """

    held_out: Record
    train: Record
    similarity: float
    is_equal: bool


def refuse_unusable_sources(workload: Workload) -> None:
    """Raise :class:`DataError` for documents that are not there or records that cannot be read.

    For what is known in a second and would else be found only after a base model was made or fetched.
    """
    data = workload.data
    if data.train is not None:
        train, validation = (Path(shown_path(Path(path))) if path else None for path in (data.train, data.validation))
        assert train is not None
        read_both(train, validation, data.columns)
    elif data.documents not in (None, "embedded") and not Path(str(data.documents)).is_dir():
        folder = shown_path(Path(str(data.documents)))
        raise DataError(f"data.documents: no directory {folder}", remedy="name the folder of your documents")


def refuse_too_long(workload: Workload, base_config: dict[str, Any]) -> None:
    """Raise :class:`ConfigurationError` where ``max_length`` exceeds the positions in a base's ``config.json``."""
    limit = base_config.get("max_position_embeddings")
    if limit and workload.data.max_length > limit:
        raise ConfigurationError(
            f"data.max_length={workload.data.max_length} exceeds the base model's {limit} positions",
            remedy=f"set data.max_length to at most {limit}",
        )


def refuse_evaluation_of_nothing(workload: Workload, remark: str | None = None) -> None:
    """Raise :class:`DataError` for a config that evaluates while it trains, where nothing is held out.

    ``remark``: why nothing is, where a share was asked for.
    """
    if workload.training.evaluate_every_steps:
        share = "add records" if remark else "give a data.validation_share"
        raise DataError(
            f"training.evaluate_every_steps is set and {remark or 'there is no validation set'}",
            remedy=f"{share}, give data.validation, or --set training.evaluate_every_steps=null",
        )


def own_files(workload: Workload) -> list[Path]:
    """The config's own files: among the documents, they would teach the model its own training."""
    return [path for path in (workload.path, workload.plans_path) if path is not None]


def corpus_paths(workload: Workload, folder: Path, run_dir: Path | None = None) -> tuple[Path, Path | None, list[str]]:
    """The corpus files, and what became of the documents where they are built from ``data.documents``.

    They are built in ``folder``. ``run_dir``: what is in it is no document.
    """
    data = workload.data
    if data.train is not None:
        return Path(data.train), Path(data.validation) if data.validation else None, []
    # a run that is given its corpus does without: what the gate measures has these modules not in its key
    from forge.training.data.corpus import build_corpus, documents_of, reasons

    root, choice = documents_of(data)
    report = build_corpus(
        root,
        folder / "corpus.jsonl",
        validation_share=data.validation_share,
        rules=data.instructions,
        choice=choice,
        without_split="hold nothing out: --set data.validation_share=0",
        own=[*own_files(workload), run_dir or folder],
        num_wordings=data.wordings if data.questions == "rules" else 0,
        force=True,
    )
    notes = [f"documents: {report.num_kept:,} kept, {len(report.skipped):,} skipped"]
    if report.skipped:
        notes[0] += f" ({reasons(report.skipped)})"
    if report.secrets:
        where = several([f"{secret.path}:{secret.line}" for secret in report.secrets])
        notes.append(f"left out for what looks like credentials: {where}")
    notes += report.notes
    if data.validation_share:
        return folder / "corpus.train.jsonl", folder / "corpus.validation.jsonl", notes
    return folder / "corpus.jsonl", None, notes


def encode_corpus(
    workload: Workload, encoder: Encoder, train_path: Path, validation_path: Path | None
) -> EncodedCorpus:
    """Read and encode both corpus files. Raises one :class:`DataError` for what is wrong with either.

    The questions that will be asked of the trained model must be ones that the chat template can hold, too.
    """
    data = workload.data
    sides = read_sides(data, train_path, validation_path)
    _refuse_unaskable(workload, encoder)

    def encode(side: tuple[Path, list[Record]]) -> Examples:
        path, those = side
        source = path if data.train is not None else f"{data.documents}, as {path.name}"  # which may be gone by then
        return encode_records(those, encoder, data, source)

    held_out = None if sides.held_out is None else (validation_path or train_path, sides.held_out)
    train, validation = of_both(encode, (train_path, sides.train), held_out)
    return EncodedCorpus(sides, train, validation)


def read_sides(data: DataSection, train_path: Path, validation_path: Path | None) -> Sides:
    """The records of both files; without one of those held out, ``data.validation_share`` of the others.

    Where these cannot be parted nothing is held out. Raises :class:`DataError` for what is wrong with either file.
    """
    records, held_out = read_both(train_path, validation_path, data.columns)
    if validation_path is not None or not data.validation_share:
        return Sides(records, held_out)
    from forge.training.data.corpus import hold_out
    from forge.training.data.duplicates import deduplicate

    places, answers = [record.place for record in records], [record.messages[-1].content for record in records]
    unique = deduplicate(places, answers)
    group_of = {places[index]: group for index, group in zip(unique.kept, unique.groups, strict=True)}
    for duplicate in unique.duplicates:  # near copies of what is kept are on its side
        group_of.setdefault(duplicate.path, group_of.get(duplicate.kept, -1))
    questions = [record.messages[0].content for record in records]
    groups = [group_of[place] for place in places]
    try:
        held = hold_out(questions, answers, groups, data.validation_share, "hold nothing out")
    except DataError as error:
        return Sides(records, None, f"nothing is held out of {train_path.name}: {error.message}")
    parts: tuple[list[Record], list[Record]] = ([], [])
    for index, record in enumerate(records):
        parts[index in held].append(record)
    remark = f"{len(held):,} of {len(records):,} records of {train_path.name} are held out (data.validation_share)"
    return Sides(*parts, remark)


def _refuse_unaskable(workload: Workload, encoder: Encoder) -> None:
    system = [] if workload.data.system_prompt is None else [Message("system", workload.data.system_prompt)]
    for number, fact in enumerate(workload.evaluation.facts):
        try:
            encode_question(encoder, [*system, Message("user", fact.question)])
        except UnrepresentableError as error:
            raise DataError(
                f"evaluation.facts[{number}]: {error.message}", remedy="word the question in another way"
            ) from error


def prepare_inputs(
    workload: Workload,
    base_dir: Path,
    folder: Path,
    template_date: str | None = None,
    *,
    run_dir: Path | None = None,
) -> PreparedInputs:
    """Build or read the corpus, tokenise it and store the examples under ``folder/examples``.

    ``run_dir``: where the run is, if not there: what is in it is no document.
    ``template_date``: of the run that is resumed; ``None``: today. Raises :class:`ConfigurationError` where
    ``max_length`` exceeds what the base can attend to and :class:`DataError` for unusable data.
    """
    refuse_too_long(workload, read_json_object(base_dir / "config.json"))
    train_path, validation_path, notes = corpus_paths(workload, folder, run_dir)
    encoder = load_encoder(base_dir, template_date)
    encoded = encode_corpus(workload, encoder, train_path, validation_path)
    sides, corpus, validation = encoded.sides, encoded.train, encoded.validation
    train = corpus if workload.data.sample is None else sample_examples(corpus, workload.data.sample)
    save_examples(train, folder / "examples" / "train", force=True)
    notes += [*encoder.remarks, *([sides.remark] if sides.remark else []), *_notes(train_path, corpus)]
    if validation is not None and sides.held_out is not None:
        notes += _notes(validation_path or train_path, validation)
        notes += describe_overlap(sides.train, sides.held_out)
        save_examples(validation, folder / "examples" / "validation", force=True)
    else:
        refuse_evaluation_of_nothing(workload, sides.remark)
    described = Inputs(
        base_sha256=base_sha256(base_dir),
        tokenizer_sha256=tokenizer_sha256(base_dir),
        corpus_sha256=sha256_file(train_path),
        validation_corpus_sha256=sha256_file(validation_path) if validation_path else None,
        train_examples_sha256=train.sha256,
        validation_examples_sha256=validation.sha256 if validation else None,
        num_train_records=train.report.num_records,
        num_divided_records=train.report.num_divided,
        num_train_examples=len(train),
        num_validation_examples=len(validation) if validation else 0,
        num_train_tokens=train.report.num_tokens,
        num_trained_tokens=train.report.num_trained_tokens,
        num_corpus_examples=len(corpus),
        num_corpus_tokens=corpus.report.num_tokens,
        corpus_tokens_squared=sum(n * n for n in corpus.report.lengths),
        template_date=encoder.template_date if encoder.is_dated else None,
        notes=notes,
    )
    return PreparedInputs(train, validation, described)


def find_overlap(train: Sequence[Record], held_out: Sequence[Record]) -> list[Overlap]:
    """Compare the answers; blanks, line ends and, for near ones, letter case do not count."""
    trained = [_answer(record) for record in train]
    others = [_answer(record) for record in held_out]
    place_of = {text: place for place, text in reversed(list(enumerate(trained)))}
    found = {j: Overlap(held_out[j], train[place_of[t]], 1.0, True) for j, t in enumerate(others) if t in place_of}
    left = [j for j in range(len(others)) if j not in found]
    for i, k, similarity in similar_pairs(trained, [others[j] for j in left], DUPLICATE_SIMILARITY):
        known = found.get(left[k])
        if known is None or similarity > known.similarity:
            found[left[k]] = Overlap(held_out[left[k]], train[i], similarity, False)
    return [overlap for _, overlap in sorted(found.items())]


def describe_overlap(train: Sequence[Record], held_out: Sequence[Record]) -> list[str]:
    """One line for equal texts and one for near ones, where there are any."""
    found = find_overlap(train, held_out)
    equal = [str(each.held_out.line) for each in found if each.is_equal]
    near = [f"{o.held_out.place} is {o.similarity:.0%} {o.train.place}" for o in found if not o.is_equal]
    texts, lines = f"of {len(held_out)} held-out texts are", []
    if equal:
        lines.append(f"{len(equal)} {texts} trained too: {held_out[0].unit}s {several(equal)}")
    if near:
        lines.append(f"{len(near)} {texts} nearly trained ones: {several(near)}")
    return lines


def _answer(record: Record) -> str:
    return " ".join(record.messages[-1].content.split())


def _notes(path: Path, examples: Examples) -> list[str]:
    notes = describe_left_out(path.name, examples.report)
    dropped = examples.report.dropped
    if dropped:
        notes.append(f"{path.name}: nothing to train in {len(dropped):,} of its records: {several(dropped)}")
    return notes
