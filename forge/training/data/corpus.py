"""A repository's documents as instruction/input/output JSONL, one record per document, and what became of each file.

Documents stay whole: whether they are cut or divided is decided by the config, when examples are made.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge.training.config.workload import DataSection, InstructionRule
from forge.training.data.discovery import Choice, Skipped, embedded_documents
from forge.training.data.documents import (
    MAX_FILE_BYTES,
    Document,
    PictureCount,
    choose,
    licences,
    read_documents,
    ways_back,
)
from forge.training.data.duplicates import Duplicate, deduplicate
from forge.training.data.notebook import fenced
from forge.training.data.rules.records import Source, count_kinds, make_records
from forge.training.data.rules.split import part_records
from forge.training.system.command import printable, rows_table, say, say_next
from forge.training.system.errors import ConfigurationError, DataError, DiskError
from forge.training.system.files import atomic_file, refuse_existing, sha256_file
from forge.training.system.secrets import Secret

if TYPE_CHECKING:
    from rich.console import Console

_NUM_LINES_SHOWN = 10
_SALT = b"forge held-out documents 1\0"
_DEFAULT_RULE = InstructionRule(prefix="", text="Set out the ideas, facts and principles of the document `{path}`")

_TITLED = re.compile(r"\s*#{1,6}[ \t]+(?P<title>[^\n]*[^\s#])[ \t#]*\n\s*(?P<rest>\S.*)", re.DOTALL)
_CONTROL_MARKER = re.compile(r"<\|[A-Za-z0-9_]{1,40}\|>")
_MARKDOWN_SUFFIXES = frozenset({".md", ".markdown", ".mdown", ".mkd", ".mdx"})
# How Markdown names the language of a fence: the name, then suffixes and whole names of files.
_FENCES = """
bash .sh .bash, c .c .h, cmake .cmake cmakelists.txt, cpp .cc .cpp .cxx .hpp .hh, csharp .cs, css .css .scss,
csv .csv, cuda .cu .cuh, dockerfile dockerfile, go .go, hcl .tf, html .html .htm, ini .ini .cfg, java .java,
javascript .js .mjs .cjs .jsx, json .json .jsonl .ipynb, julia .jl, kotlin .kt, latex .tex, lua .lua,
makefile makefile .mk, php .php, powershell .ps1, protobuf .proto, python .py .pyi, r .r, ruby .rb, rust .rs,
scala .scala, sql .sql, swift .swift, toml .toml, typescript .ts .tsx, xml .xml .svg, yaml .yaml .yml, zsh .zsh
"""
_LANGUAGES = {name: language for entry in _FENCES.split(",") for language, *names in [entry.split()] for name in names}


@dataclass(frozen=True)
class Folder:
    """Kept documents under a top-level folder, ``.`` for the root itself."""

    name: str
    num_documents: int
    num_characters: int


@dataclass(frozen=True)
class MarkerCount:
    """Literal chat markers such as ``<|im_end|>`` in a kept document; tokenisation makes them plain text."""

    path: str
    num_markers: int


@dataclass(frozen=True)
class Output:
    """A file that was written."""

    path: str
    num_records: int
    sha256: str


@dataclass(frozen=True)
class QuestionsReport:
    """Records made by rule, by kind. What is left out: see :class:`RuleRecords` and :class:`Parted`."""

    num_train: dict[str, int]
    num_held_out: dict[str, int]
    num_facts: int
    num_held_out_facts: int
    num_ambiguous: int
    num_left_out: int


@dataclass(frozen=True)
class CorpusReport:
    """``num_files``: kept and skipped ones, not what lies in skipped folders (their names end in ``/``).

    ``num_bytes`` and ``megabytes_per_second`` are of all text read, duplicates included; a megabyte
    is 10^6 bytes. ``secrets`` stand in skipped documents, or in kept ones where the user allows them, all of them
    where ``secrets_allowed``. ``pictures`` were left out of kept documents. ``licences``: kept documents that are named
    as such. ``notes``: what the user should know besides. Fewer than ``validation_share`` are held out where large
    families of related documents stay together.
    """

    root: str
    num_files: int
    num_kept: int
    num_characters: int
    num_bytes: int
    num_train: int
    num_validation: int
    validation_share: float
    folders: list[Folder]
    skipped: list[Skipped]
    duplicates: list[Duplicate]
    skipped_by_reason: dict[str, int]
    control_markers: list[MarkerCount]
    secrets: list[Secret]
    secrets_allowed: bool
    pictures: list[PictureCount]
    licences: list[str]
    notes: list[str]
    outputs: list[Output]
    seconds: float
    megabytes_per_second: float
    questions: QuestionsReport | None = None


def documents_of(data: DataSection) -> tuple[Path, Choice]:
    """The folder of a config's documents, and what it takes and leaves there. Raises as :func:`choose`."""
    assert data.documents is not None
    root = embedded_documents() if data.documents == "embedded" else Path(data.documents)
    return root, choose(root, data.include, data.exclude, data.allow)


def build_corpus(
    root: Path,
    output: Path,
    *,
    validation_share: float = 0.0,
    rules: Sequence[InstructionRule] = (),
    choice: Choice | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    without_split: str = "leave --split out",
    own: Sequence[Path] = (),
    num_wordings: int = 0,
    force: bool = False,
) -> CorpusReport:
    """Write a repository's documents to ``output``, sorted by path, and say what became of each file.

    With a ``validation_share``, ``NAME.train.jsonl`` and ``NAME.validation.jsonl`` are written instead
    of ``NAME.jsonl``, both or neither. The first of ``rules`` whose prefix a path begins with words
    its instruction, a default where none does. ``own``: files and folders that are no documents. ``without_split``:
    what to do to hold nothing out. ``num_wordings``: 0 for a record per document; from 1 on further ones are made by
    rule, each document and each question in so many wordings. Raises
    :class:`DataError` where there is nothing to use, :class:`DiskError` where an output exists (unless ``force``) or
    cannot be written.
    """
    started = time.perf_counter()
    if not 0.0 <= validation_share < 1.0:
        raise ConfigurationError(f"a validation share of {validation_share} is not in [0, 1)")
    if not root.is_dir():
        problem = "is not a directory" if root.exists() else "does not exist"
        raise DataError(f"{root} {problem}", remedy="name the folder that holds the documents")
    sides = [output.with_name(f"{output.stem}.{side}{output.suffix}") for side in ("train", "validation")]
    targets = sides if validation_share else [output]
    for target in targets:
        if target.is_dir():
            raise DiskError(f"{target} is a directory", remedy="name a file, for example corpus.jsonl")
        refuse_existing(target, force)

    root = root.resolve()
    exclude = passed_over([output, *sides, *own])
    choice = choice or Choice()
    read = read_documents(root, exclude=exclude, choice=choice, max_file_bytes=max_file_bytes)
    documents, skipped = read.documents, read.skipped
    unique = deduplicate([d.path for d in documents], [d.text for d in documents])
    for duplicate in unique.duplicates:
        reason = "exact duplicate" if duplicate.exact else "near duplicate"
        skipped.append(Skipped(duplicate.path, reason, f"of {duplicate.kept}"))
    kept = [documents[index] for index in unique.kept]
    if not kept:
        why = "git ignores the folder itself" if _is_ignored_itself(skipped) else reasons(skipped)
        raise DataError(
            f"no usable document in {root}: {why or 'it is empty'}",
            remedy="documents are UTF-8 text files that .gitignore does not name",
        )

    held: set[int] = set()
    if validation_share:
        held = hold_out([d.path for d in kept], [d.text for d in kept], unique.groups, validation_share, without_split)
    questions = None
    if num_wordings:
        sides_of, questions = _by_rule(kept, rules, held, num_wordings, validation_share, without_split)
    else:
        lines = [_json_line(_plain_row(document, rules)) for document in kept]
        sides_of = [[line for i, line in enumerate(lines) if (i in held) == side] for side in (False, True)]
    outputs = _write(targets, sides_of)

    seconds = time.perf_counter() - started
    num_bytes = sum(len(document.text.encode()) for document in documents)
    markers = [MarkerCount(d.path, num) for d in kept if (num := len(_CONTROL_MARKER.findall(d.text)))]
    return CorpusReport(
        root=str(root),
        num_files=len(documents) - len(unique.duplicates) + sum(not s.path.endswith("/") for s in skipped),
        num_kept=len(kept),
        num_characters=sum(len(document.text) for document in kept),
        num_bytes=num_bytes,
        num_train=len(kept) - len(held),
        num_validation=len(held),
        validation_share=validation_share,
        folders=_by_folder(kept),
        skipped=sorted(skipped, key=lambda s: s.path),
        skipped_by_reason=_counted(skipped),
        duplicates=unique.duplicates,
        control_markers=markers,
        secrets=read.secrets,
        secrets_allowed=choice.allow_secrets,
        pictures=[count for count in read.pictures if count.path in {d.path for d in kept}],
        licences=licences([d.path for d in kept]),
        notes=read.notes,
        outputs=outputs,
        seconds=seconds,
        megabytes_per_second=num_bytes / 1e6 / seconds,
        questions=questions,
    )


def passed_over(own: Sequence[Path]) -> Callable[[str], bool]:
    """True for Forge's own files and folders (a corpus, a run), and for what a killed command left beside them."""
    absolute = (Path(os.path.abspath(o)) for o in own)  # `.` and `..` have no name of their own
    places = [(str(o.parent.resolve()), o.name) for o in absolute]
    whole = {os.path.join(*place) for place in places}
    below = tuple(os.path.join(place, "") for place in whole)
    partial = tuple(os.path.join(folder, f".{name}.") for folder, name in places)
    return lambda path: path in whole or path.startswith(below) or (path.startswith(partial) and path.endswith(".part"))


def _is_ignored_itself(skipped: list[Skipped]) -> bool:
    return Skipped("", "ignored by .gitignore") in skipped


def render_document(path: str, text: str) -> str:
    """What is learnt: Markdown as it is; anything else under its name, in a fence longer than any in it."""
    name = path.rsplit("/", 1)[-1]
    suffix = os.path.splitext(name)[1].lower()
    if suffix in _MARKDOWN_SUFFIXES:
        return text
    language = _LANGUAGES.get(name.lower()) or _LANGUAGES.get(suffix, "")
    return f"# File: {name}\n\n{fenced(text, language)}"


def _by_rule(
    kept: Sequence[Document],
    rules: Sequence[InstructionRule],
    held: set[int],
    num_wordings: int,
    share: float,
    without: str,
) -> tuple[list[list[str]], QuestionsReport]:
    """The lines of both sides, made by rule."""
    sources = []
    for document in kept:
        instruction, output = _asked(document, rules)
        text, num_before = _as_trained(document), 0
        if text != document.text:
            num_before = text[: text.index(document.text)].count("\n")
        num_lines = len(document.text.splitlines()) if num_before else None
        sources.append(Source(document.path, text, instruction, output, 1 - num_before, num_lines))
    made = make_records(sources, num_wordings)
    part = partial(hold_out, share=share, without=without) if held else None
    parted = part_records(made.records, {kept[index].path for index in held}, part)
    report = QuestionsReport(
        count_kinds(parted.train),
        count_kinds(parted.held_out),
        parted.num_facts,
        parted.num_held_out,
        made.num_ambiguous,
        parted.num_left_out,
    )
    return [[_json_line(record.as_row()) for record in side] for side in (parted.train, parted.held_out)], report


def _plain_row(document: Document, rules: Sequence[InstructionRule]) -> dict[str, str]:
    instruction, output = _asked(document, rules)
    return {"instruction": instruction, "input": "", "output": output}


def _json_line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _as_trained(document: Document) -> str:
    return document.text if document.is_markdown else render_document(document.path, document.text)


def _asked(document: Document, rules: Sequence[InstructionRule]) -> tuple[str, str]:
    """The instruction that a document's rule words, and what answers it."""
    rule = next(rule for rule in (*rules, _DEFAULT_RULE) if document.path.startswith(rule.prefix))
    output = _as_trained(document)
    words = {"{path}": document.path}
    if "{title}" in rule.text:
        words["{title}"], output = _title_and_rest(document.path, output)
    return re.sub(r"\{(?:path|title)\}", lambda match: words[match[0]], rule.text), output


def _title_and_rest(path: str, text: str) -> tuple[str, str]:
    """The heading that a document begins with, and the text below it. Raises :class:`DataError` if one is missing."""
    match = _TITLED.fullmatch(text)
    if match is None:
        raise DataError(
            f"{path} does not begin with a heading and text below it, and its rule in data.instructions asks {{title}}",
            remedy="begin it with a line `# What is asked`, or use {path} in that rule",
        )
    return match["title"], match["rest"]


def _write(targets: list[Path], sides: list[list[str]]) -> list[Output]:
    """Write one file or both. Both are on the disk before either has its name, and an old training
    file goes first, so that no interruption leaves it beside a new validation file."""
    if len(targets) == 1:
        with atomic_file(targets[0]) as stream:
            stream.writelines(sides[0])
    else:
        train, validation = targets
        naming = False
        try:
            with atomic_file(train) as stream, atomic_file(validation) as held_out:
                for each, side in zip((stream, held_out), sides, strict=True):
                    each.writelines(side)
                    each.flush()
                    os.fsync(each.fileno())
                naming = True
                train.unlink(missing_ok=True)
        except BaseException:
            if naming:
                for target in targets:
                    target.unlink(missing_ok=True)
            raise
    return [Output(str(t), len(side), sha256_file(t)) for t, side in zip(targets, sides, strict=False)]


def _by_folder(documents: list[Document]) -> list[Folder]:
    sizes: dict[str, list[int]] = {}
    for document in documents:
        folder, separator, _ = document.path.partition("/")
        sizes.setdefault(folder if separator else ".", []).append(len(document.text))
    return [Folder(name, len(rows), sum(rows)) for name, rows in sorted(sizes.items())]


def hold_out(paths: Sequence[str], texts: Sequence[str], groups: Sequence[int], share: float, without: str) -> set[int]:
    """Indices of the documents to hold out: about ``share`` of them, at least one, never all.

    ``groups``: documents with equal numbers stay on one side. Depends on paths and contents only,
    not on a random state: the same documents give the same split on every machine, and one more
    document moves few others. Groups larger than what is wanted are trained on. Raises
    :class:`DataError` where nothing can be held out; ``without``: what to do to hold nothing out.
    """
    if len(paths) < 2:
        raise DataError(
            f"{len(paths)} document{'s' * (len(paths) != 1)} cannot be split into training and validation",
            remedy=f"add documents, or {without}",
        )
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    if len(members) < 2:
        raise DataError(
            f"all {len(paths)} documents are near copies of one another, so none can be held out",
            remedy=f"add other documents, or {without}",
        )
    wanted = min(max(1, round(share * len(paths))), len(paths) - 1)
    held: set[int] = set()
    for related in sorted(members.values(), key=lambda related: _split_key(paths[related[0]], texts[related[0]])):
        if len(held) + len(related) <= wanted:
            held.update(related)
    smallest = min(members.values(), key=len)
    return held or set(smallest)


def _split_key(path: str, text: str) -> bytes:
    return hashlib.sha256(_SALT + path.encode("utf-8") + b"\0" + text.encode("utf-8")).digest()


def reasons(skipped: list[Skipped]) -> str:
    """The number of skipped paths by reason, most frequent first, on one line."""
    return ", ".join(f"{count:,} {reason}" for reason, count in _counted(skipped).items())


def _counted(skipped: list[Skipped]) -> dict[str, int]:
    return dict(sorted(Counter(s.reason for s in skipped).items(), key=lambda item: (-item[1], item[0])))


def print_report(report: CorpusReport, console: Console) -> None:
    """Print files, characters, what was kept, what was skipped and why, and the next command."""
    from rich.table import Table
    from rich.text import Text

    exact = [d for d in report.duplicates if d.exact]
    near = [d for d in report.duplicates if not d.exact]
    rows = [
        ("files", f"{report.num_files:,}"),
        ("kept", f"{report.num_kept:,} documents, {report.num_characters:,} characters"),
        ("skipped", f"{len(report.skipped):,}" + (f": {reasons(report.skipped)}" if report.skipped else "")),
        ("duplicates", f"{len(exact):,} exact, {len(near):,} near (dropped)"),
        ("secrets", f"{len(report.secrets):,}" + (" (kept: --allow-secrets)" if report.secrets_allowed else "")),
        ("chat markers as text", f"{sum(m.num_markers for m in report.control_markers):,}"),
        ("pictures left out", f"{sum(p.num_pictures for p in report.pictures):,}"),
        ("licences", f"{len(report.licences):,}" + (" (kept: --exclude leaves them out)" if report.licences else "")),
        ("speed", f"{report.megabytes_per_second:.1f} MB/s: {report.num_bytes / 1e6:.1f} MB, {report.seconds:.2f} s"),
    ]
    if report.num_validation:
        few = report.num_validation < 0.8 * report.validation_share * report.num_kept
        why = ", fewer than asked: related documents stay on one side" if few else ""
        rows.insert(2, ("split", f"{report.num_train:,} to train, {report.num_validation:,} held out{why}"))
    console.print(rows_table(f"dataset: {printable(report.root)}", rows))
    folders = Table(title="kept by folder", title_justify="left")
    folders.add_column("folder", overflow="fold")
    folders.add_column("documents", justify="right")
    folders.add_column("characters", justify="right")
    for folder in report.folders:
        folders.add_row(Text(printable(folder.name)), f"{folder.num_documents:,}", f"{folder.num_characters:,}")
    console.print(folders)
    if report.questions is not None:
        _print_questions(report.questions, console)
    for reason in report.skipped_by_reason:
        if reason not in ("exact duplicate", "near duplicate", "secret"):  # those have lists of their own
            of_it = [s for s in report.skipped if s.reason == reason]
            _print_lines(
                console,
                f"skipped, {reason}",
                [s.path + (f": {s.detail}" if s.detail else "") for s in of_it],
            )
    _print_lines(console, "secrets", [f"{s.path}:{s.line}: {s.rule}" for s in report.secrets])
    _print_lines(console, "exact duplicates", [f"{d.path} is the same as {d.kept}" for d in exact])
    _print_lines(console, "near duplicates", [f"{d.path} is {d.similarity:.0%} the same as {d.kept}" for d in near])
    _print_lines(console, "pictures left out", [f"{p.path}: {p.num_pictures:,}" for p in report.pictures])
    _print_lines(console, "licences", report.licences)
    _print_lines(console, "chat markers", [f"{m.path}: {m.num_markers:,}" for m in report.control_markers])
    _print_lines(console, "notes", [*report.notes, *ways_back(report.skipped)])
    for output in report.outputs:
        say(console, f"wrote {output.path}: {output.num_records:,} records, sha256 {output.sha256[:16]}")
    names = ("data.train", "data.validation")
    settings = [part for n, o in zip(names, report.outputs, strict=False) for part in ("--set", f"{n}={o.path}")]
    say_next(console, ["forge", "preview", "CONFIG", *settings])


def _print_questions(questions: QuestionsReport, console: Console) -> None:
    from rich.table import Table

    table = Table(title="records by kind, made by rule", title_justify="left")
    table.add_column("kind")
    table.add_column("to train", justify="right")
    table.add_column("held out", justify="right")
    for kind in dict.fromkeys((*questions.num_train, *questions.num_held_out)):
        table.add_row(kind, f"{questions.num_train.get(kind, 0):,}", f"{questions.num_held_out.get(kind, 0):,}")
    console.print(table)
    say(console, f"facts: {questions.num_facts:,}, all questions of {questions.num_held_out_facts:,} held out")
    if questions.num_ambiguous:
        say(console, f"left out: {questions.num_ambiguous:,} questions with different answers in different places")
    if questions.num_left_out:
        say(
            console,
            f"left out: {questions.num_left_out:,} held-out records whose fact another document trains",
        )


def _print_lines(console: Console, title: str, lines: list[str]) -> None:
    if lines:
        say(console, f"{title}:")
    for line in lines[:_NUM_LINES_SHOWN]:
        say(console, printable(line), "  ")
    if len(lines) > _NUM_LINES_SHOWN:
        say(console, f"and {len(lines) - _NUM_LINES_SHOWN:,} more (--json lists all)", "  ")
