"""Records from documents by rule: the documents in several wordings, their sections, completions, questions.

Every answer is cut out of its document; every record says from which lines.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from forge.training.data.rules.facts import Fact, draw_facts
from forge.training.data.rules.markdown import Page, read_page
from forge.training.data.rules.wordings import (
    ANSWER_FIRST,
    CONTEXT_FIRST,
    continue_instruction,
    document_instructions,
    section_instruction,
)

Form = Literal["answer", "answer first", "context first"]
_LEAST_SECTION, _LEAST_COMPLETION, _MOST_COMPLETION = 80, 400, 6000  # characters
_MOST_PASSAGE = 600  # characters that a reply quotes beside its answer
_BORDER = re.compile(r"\n[ \t]*\n\s*|(?<=[.!?])\s+|(?<=[。！？])|\n")
_FILLERS = frozenset(
    [
        "a",
        "an",
        "and",
        "at",
        "by",
        "does",
        "for",
        "from",
        "given",
        "has",
        "in",
        "is",
        "it",
        "of",
        "on",
        "or",
        "say",
        "the",
        "to",
        "under",
        "was",
        "what",
        "which",
    ]
)


@dataclass(frozen=True, slots=True)
class Source:
    """A document as it is trained. ``instruction``: its rule's.

    ``first_line``: the number in the file of the first line of ``text``, 0 or less where lines were put before it.
    ``num_lines``: of the file, where lines were put around it.
    """

    path: str
    text: str
    instruction: str
    answer: str | None = None  # what its instruction is answered with, where that is less than the text
    first_line: int = 1
    num_lines: int | None = None

    def lines(self, lines: tuple[int, int]) -> tuple[int, int]:
        """Lines of ``text``, from 0, the last one excluded, as the file's own, from 1, the last one included."""
        first, last = self.first_line + lines[0], self.first_line + lines[1] - 1
        most = last if self.num_lines is None else self.num_lines
        return min(max(1, first), most), max(1, min(last, most))


@dataclass(frozen=True, slots=True)
class RuleRecord:
    """``kind``: ``document``, ``section``, ``completion`` or a fact's. ``quotes``: what of the output is cut out of it.

    Facts of one ``group`` may say the same; 0 for what is no question. ``key``: the group's digest.
    """

    kind: str
    form: Form
    instruction: str
    output: str
    quotes: tuple[str, ...]
    path: str
    first_line: int
    last_line: int
    group: int = 0
    key: str = ""

    def as_row(self) -> dict[str, Any]:
        """As a line of the corpus says it."""
        made = {"kind": self.kind, "form": self.form, "document": self.path, "lines": [self.first_line, self.last_line]}
        if self.key:
            made["fact"] = self.key
        return {"instruction": self.instruction, "input": "", "output": self.output, "made_from": made}


@dataclass(frozen=True)
class RuleRecords:
    """``num_ambiguous``: questions left out, which have different answers in different places."""

    records: list[RuleRecord]
    num_ambiguous: int


def make_records(sources: Sequence[Source], num_wordings: int) -> RuleRecords:
    """All records, by document and line, then kind. ``num_wordings``: of each document and each question, 1 to 4."""
    records: list[RuleRecord] = []
    facts: list[Fact] = []
    place: list[int] = []  # in records, before which each fact's stand
    for source in sources:
        page = read_page(source.text)
        records += _of_document(source, page, num_wordings)
        drawn = draw_facts(source.path, source.text, source.first_line, page)
        facts += drawn
        place += [len(records)] * len(drawn)
    groups = group_facts(facts)
    keys = _group_keys(facts, groups)
    asked: defaultdict[str, set[str]] = defaultdict(set)
    for fact in facts:
        for question in fact.questions:
            asked[question].add(fact.answer)
    before: defaultdict[int, list[RuleRecord]] = defaultdict(list)
    num_ambiguous, seen = 0, set[tuple[str, str]]()
    for fact, group, where in zip(facts, groups, place, strict=True):
        usable = [question for question in fact.questions if len(asked[question]) == 1]
        num_ambiguous += len(fact.questions) - len(usable)
        for record in _of_fact(fact, usable[:num_wordings], group, keys[group]):
            if (record.instruction, record.output) not in seen:
                seen.add((record.instruction, record.output))
                before[where].append(record)
    ordered: list[RuleRecord] = []
    for index, record in enumerate(records):
        ordered += before.pop(index, [])
        ordered.append(record)
    return RuleRecords([*ordered, *before.pop(len(records), [])], num_ambiguous)


def _of_document(source: Source, page: Page, num_wordings: int) -> Iterator[RuleRecord]:
    def record(kind: str, instruction: str, output: str, lines: tuple[int, int]) -> RuleRecord:
        return RuleRecord(kind, "answer", instruction, output, (output,), source.path, *source.lines(lines))

    path, title = source.path, page.title
    whole = (0, len(page.starts) - 1)
    answer = source.text if source.answer is None else source.answer
    yield record("document", source.instruction, answer, whole)
    for instruction in document_instructions(path, title)[: num_wordings - 1]:
        yield record("document", instruction, source.text, whole)
    for number, (heading, lines) in enumerate(page.sections()):
        text = page.source(lines)
        if lines[0] == 0 and lines[1] == whole[1]:
            continue  # the document itself
        below = page.source((heading.lines[1], lines[1]))
        if heading.inline.plain and len(below) >= _LEAST_SECTION:
            yield record("section", section_instruction(path, title, heading.inline.plain, number), text, lines)
        own = _own_lines(page, heading.lines[1], lines[1])
        yield from _completion(source, page, own, number)
    if not any(block.kind == "heading" for block in page.blocks):
        yield from _completion(source, page, whole, 0)


def _own_lines(page: Page, first: int, last: int) -> tuple[int, int]:
    """A section's lines without those of the sections below it."""
    inner = (b.lines[0] for b in page.blocks if b.kind == "heading" and first <= b.lines[0] < last)
    return first, next(inner, last)


def _completion(source: Source, page: Page, lines: tuple[int, int], number: int) -> Iterator[RuleRecord]:
    """What follows the first half of a stretch of text, divided at a paragraph or else a sentence near its middle."""
    text = page.source(lines)
    if not _LEAST_COMPLETION <= len(text) <= _MOST_COMPLETION:
        return
    borders = [match for match in _BORDER.finditer(text) if len(text) / 4 <= match.end() <= len(text) * 3 / 4]
    if not borders:
        return
    best = min(borders, key=lambda match: (match[0].count("\n") < 2, abs(match.end() - len(text) / 2)))
    given, rest = text[: best.start()], text[best.end() :]
    if not given.strip() or not rest.strip():
        return
    begin = page.text.index(text, page.starts[lines[0]])
    instruction = continue_instruction(source.path, page.title, given, number)
    cut = (bisect_right(page.starts, begin + best.end()) - 1, bisect_right(page.starts, begin + len(text) - 1))
    yield RuleRecord("completion", "answer", instruction, rest, (rest,), source.path, *source.lines(cut))


def _of_fact(fact: Fact, questions: Sequence[str], group: int, key: str) -> Iterator[RuleRecord]:
    where = (fact.path, fact.first_line, fact.last_line, group, key)
    for question in questions:
        yield RuleRecord(fact.kind, "answer", question, fact.answer, (fact.answer,), *where)
    passage, answer = fact.passage, fact.answer
    if not questions or passage.strip() == answer.strip() or len(passage) > _MOST_PASSAGE:
        return
    quotes = (answer, passage)
    first, second = ANSWER_FIRST.format(question=questions[0]), CONTEXT_FIRST.format(question=questions[-1])
    yield RuleRecord(fact.kind, "answer first", first, f"{answer}\n\n{passage}", quotes, *where)
    yield RuleRecord(fact.kind, "context first", second, f"{passage}\n\n{answer}", quotes, *where)


def group_facts(facts: Sequence[Fact]) -> list[int]:
    """A number from 1 for each fact. Facts that may say the same have the same: no question of one is new to a model
    that was trained on another.

    The same are those in the same lines of a document, and those of equal answers whose subjects share a word.
    """
    parent = list(range(len(facts)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first_with: dict[tuple[str, str], int] = {}
    for index, fact in enumerate(facts):
        answer = normalised(fact.answer)
        for word in _words(fact.subject):
            parent[root(index)] = root(first_with.setdefault((answer, word), index))
    by_path: defaultdict[str, list[int]] = defaultdict(list)
    for index, fact in enumerate(facts):
        by_path[fact.path].append(index)
    for indices in by_path.values():
        last, open_index = 0, -1
        for index in sorted(indices, key=lambda i: (facts[i].first_line, -facts[i].last_line)):
            if facts[index].first_line <= last:
                parent[root(index)] = root(open_index)
            last, open_index = max(last, facts[index].last_line), index
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(index), len(numbers) + 1) for index in range(len(facts))]


def normalised(text: str) -> str:
    """Letters and digits alone, case and width apart: how answers are compared."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded)) or folded.strip()


def _words(subject: str) -> list[str]:
    words = normalised(subject).split()
    return [word for word in words if word not in _FILLERS] or words


def _group_keys(facts: Sequence[Fact], groups: Sequence[int]) -> dict[int, str]:
    """Twelve hex digits per group, of its least fact."""
    least: dict[int, str] = {}
    for fact, group in zip(facts, groups, strict=True):
        text = f"{fact.path}\0{fact.subject}\0{fact.answer}"
        least[group] = min(text, least.get(group, text))
    return {
        group: hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12] for group, text in least.items()
    }


def count_kinds(records: Sequence[RuleRecord]) -> dict[str, int]:
    """Records by kind, most frequent first; those of other forms by theirs."""
    counts = Counter(record.kind if record.form == "answer" else f"{record.kind}, {record.form}" for record in records)
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))
