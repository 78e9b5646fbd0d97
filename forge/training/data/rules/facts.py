"""Facts drawn from documents by rule: what can be asked, in several wordings, and the answer as it is written there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from forge.training.data.rules.code import named_things
from forge.training.data.rules.markdown import Block, Inline, Page, plain_line, read_page
from forge.training.data.rules.wordings import questions
from forge.training.system.secrets import credential_rule

FactKind = Literal["title", "front matter", "heading", "list", "definition", "table", "sentence", "code"]

_MOST_DRAFTED = 200_000  # characters of a document from which drafts are taken
_MOST_ANSWER, _MOST_DRAFT_ANSWER = 200, 60  # characters, of an answer within a line
_MOST_PARAGRAPH, _LEAST_PARAGRAPH = 1200, 20  # characters
_MOST_ITEMS, _MOST_COLUMNS = 30, 12

_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")
_IS = re.compile(
    r"(?P<subject>(?:(?:The|A|An) )?[\w'’-]+(?: [\w'’-]+){0,5}) (?P<verb>is|was|are|were) (?P<answer>\S.{1,200}?)\.?"
)
_WHEN = re.compile(r"(?P<done>[a-z]+(?:ed|ilt|ade|und|wn|en)) in (?P<year>\d{4})")
_KEY = r"[^\s:：|<>\[\]{}=][^:：|<>\[\]{}=]{0,38}?"
_NAMED = re.compile(rf"(?P<key>{_KEY})\s*[:：](?:\s+|(?<=：))(?P<answer>\S.*)")
_DASHED = re.compile(r"(?P<key>[^—–:|<>]{1,40}?)\s+(?:—|–|-)\s+(?P<answer>\S.*)")
_MARKED_KEY = re.compile(r"(?:[-*+>]\s+|\d+[.)]\s+)?(?:\*\*|__|`)")
_PLAIN_KEY = re.compile(r"[^\W\d_a-z][\w'’()./ -]*")  # not marked: begins with a capital, or in a script that has none
_WRAPPED = re.compile(r"(\*\*|__|[*_`\"'])((?:(?!\1).)+)\1|“([^“”]+)”")
_ENDING = re.compile(r"[.;,]+$")
# As a first word: the subject is named elsewhere.
_POINTERS = frozenset(
    {"it", "this", "that", "there", "he", "she", "they", "we", "you", "i", "what", "if", "when", "here"}
    | {"these", "those", "which", "who", "how", "why", "each", "one", "all", "some", "and", "but", "or", "so"}
    | {"then", "because", "while", "as", "to", "in", "on", "at", "by", "for", "with", "from", "not", "no", "our"}
    | {"your", "their", "its", "his", "her", "note", "e.g", "i.e", "result", "example", "warning", "todo"}
    | {"nobody", "everybody", "everyone", "someone", "nothing", "everything", "something", "another", "both"}
)
# Anywhere in it: it is a clause, and no name of a thing.
_CLAUSES = frozenset(
    [
        "that",
        "which",
        "who",
        "is",
        "are",
        "was",
        "were",
        "will",
        "would",
        "can",
        "could",
        "must",
        "should",
        "may",
        "if",
        "has",
        "have",
        "had",
        "not",
        "do",
        "does",
    ]
)
_VAGUE = re.compile(r"^(?:not|no|also|only|very|more|less|used|done|made|being|now|still|just|it|this|that)\b", re.I)
_LINKED = re.compile(r"[\[\]<>|{}\\#=]|https?:")
_ENDS_LINKED = re.compile(r"\]\([^)]*\)\W*$")  # the value is a link
_DRAFT_ENDS = re.compile(r"[,;:()!?]")


@dataclass(frozen=True, slots=True)
class Fact:
    """``answer`` stands, letter by letter, in ``passage``, and that in the document ``path``, at these lines (from 1).

    ``questions``: the same question in several wordings, the plainest first.
    """

    kind: FactKind
    subject: str
    questions: tuple[str, ...]
    answer: str
    passage: str
    path: str
    first_line: int
    last_line: int


@dataclass(frozen=True)
class DraftFact:
    """``answer`` stands, letter by letter, in the document ``path``."""

    question: str
    answer: str
    path: str


def draw_facts(path: str, text: str, first_line: int = 1, page: Page | None = None) -> list[Fact]:
    """What rules find in a document, in the order of its lines; the same text gives the same facts.

    ``text``: as it is trained (:func:`forge.training.data.corpus.render_document`). ``first_line``: the number of its
    first line in the file. ``page``: the text, parsed already.
    """
    drawer = _Drawer(path, page or read_page(text), first_line)
    found = sorted(drawer.draw(), key=lambda fact: fact.first_line)  # stable: by rule within a line
    return list({(fact.questions[0], fact.answer): fact for fact in reversed(found)}.values())[::-1]


def draft_facts(documents: Sequence[tuple[str, str]], most: int = 5) -> list[DraftFact]:
    """At most ``most`` questions for a person to edit, from (path, text), the likeliest to be checkable first.

    Of as many documents as can be, and not all of a kind. The same documents give the same drafts.
    """
    ranked: list[tuple[int, int, str, Fact]] = []
    for path, text in documents:
        rated = [(_score(fact), fact) for fact in draw_facts(path, text[:_MOST_DRAFTED]) if _is_draft(fact)]
        own = sorted(rated, key=lambda pair: -pair[0])[:most]
        ranked += [(place, -score, path, fact) for place, (score, fact) in enumerate(own)]
    ranked.sort(key=lambda row: row[:3])  # the best of each document before anybody's second
    chosen: list[Fact] = []
    of_a_kind: Counter[str] = Counter()
    for limit in (2, most):  # two of a kind first: a repository repeats itself
        for *_, fact in ranked:
            is_limited = fact.kind != "sentence"
            is_new = all(fact.questions[0] != old.questions[0] and fact.answer != old.answer for old in chosen)
            if is_new and len(chosen) < most and not (is_limited and of_a_kind[fact.kind] >= limit):
                chosen.append(fact)
                of_a_kind[fact.kind] += 1
    return [DraftFact(fact.questions[0], fact.answer, fact.path) for fact in chosen]


def _is_draft(fact: Fact) -> bool:
    """Whether a person would ask this and a program find the answer."""
    question, answer = fact.questions[0], fact.answer
    return (
        fact.kind not in ("heading", "list")
        and 3 <= len(answer) <= _MOST_DRAFT_ANSWER
        and len(answer.split()) <= 8
        and not (fact.kind in ("sentence", "definition") and _DRAFT_ENDS.search(answer))
        and not (fact.kind == "code" and fact.subject.rpartition(".")[2] in answer)  # a declaration
        and answer.lower() not in question.lower()
        and (question + answer).isprintable()
        and not credential_rule(answer)
        and not credential_rule(question)
    )


def _score(fact: Fact) -> int:
    answer = fact.answer
    score = {"sentence": 3, "table": 3, "definition": 2, "front matter": 1}.get(fact.kind, 1)
    return (
        score + 3 * bool(re.search(r"\d", answer)) + bool(re.search(r"[A-Z]", answer[1:])) + (len(answer.split()) <= 4)
    )


class _Drawer:
    """The rules on one document."""

    def __init__(self, path: str, page: Page, first_line: int) -> None:
        self.path, self.page, self.first_line = path, page, first_line
        self.name = path.rpartition("/")[2]
        self.title = page.title if page.title and self.name not in page.title else None

    def draw(self) -> Iterator[Fact]:
        yield from self._titles()
        for entry in self.page.front_matter:
            yield from self._fact(
                "front matter", "front matter", entry.key, entry.value, (entry.line, entry.line + 1), subject=entry.key
            )
        for block in self.page.blocks:
            if block.kind == "table":
                yield from self._table(block)
            elif block.kind == "fence":
                yield from self._code(block)
            elif block.kind == "list":
                yield from self._list(block)
            elif block.kind in ("paragraph", "item"):
                if block.kind == "paragraph":
                    yield from self._heading(block)
                yield from self._definitions(block)
                yield from self._sentences(block)

    def _titles(self) -> Iterator[Fact]:
        heading = next((b for b in self.page.blocks if b.kind == "heading" and b.level == 1 and b.inline.plain), None)
        if heading is not None and self.title is not None:
            yield from self._fact(
                "title", "title", self.path, self._quoted(heading.inline, heading.lines), heading.lines
            )

    def _heading(self, block: Block) -> Iterator[Fact]:
        """A section begins with a paragraph."""
        source = self.page.source(block.lines)
        if block.opens_section and block.headings and _LEAST_PARAGRAPH <= len(source) <= _MOST_PARAGRAPH:
            subject = block.headings[-1]
            if subject and self.name not in subject:
                yield from self._fact("heading", "heading", subject, source, block.lines, subject=subject)

    def _list(self, block: Block) -> Iterator[Fact]:
        """A section is a list, perhaps below a paragraph."""
        source = self.page.source(block.lines)
        if (
            block.opens_section
            and block.headings
            and 2 <= block.num_items <= _MOST_ITEMS
            and len(source) <= _MOST_PARAGRAPH
        ):
            subject = block.headings[-1]
            if subject:
                yield from self._fact("list", "list", subject, source, block.lines, subject=subject)

    def _table(self, block: Block) -> Iterator[Fact]:
        """A row's first cell names what its others say."""
        head, *rows = block.rows
        if not 2 <= len(head) <= _MOST_COLUMNS:
            return
        names = Counter(row[0].plain for row in rows)
        for row, line in zip(rows, block.row_lines[1:], strict=True):
            lines, key = (line, line + 1), row[0].plain
            if not key or names[key] > 1 or len(key) > 80:
                continue
            for number in range(1, min(len(head), len(row))):
                column, cell = head[number].plain, row[number]
                answer = self._quoted(cell, lines)
                if not column or not cell.plain or len(cell.plain) > _MOST_ANSWER:
                    continue
                yield from self._fact("table", "table", key, answer, lines, subject=key, column=column)
                same = sum(len(other) > number and other[number].plain == cell.plain for other in rows)
                if head[0].plain and same == 1 and len(cell.plain) <= 80:
                    first = self._quoted(row[0], lines)
                    asked = {"subject": column, "column": head[0].plain, "value": cell.plain}
                    yield from self._fact("table", "table, reversed", cell.plain, first, lines, **asked)

    def _definitions(self, block: Block) -> Iterator[Fact]:
        """Lines such as ``Version: 3.1``, ``**Term** - what it is``, and a term with ``: what it is`` below it."""
        lines = block.inline.source.split("\n")
        for number, line in enumerate(lines):
            if number and line.startswith(": ") and lines[number - 1].strip():
                yield from self._defined(block, number - 1, number, plain_line(lines[number - 1]), plain_line(line[2:]))
                continue
            if not re.search(r"[:：—–]|\s-\s", line) or _ENDS_LINKED.search(line):
                continue
            plain, is_marked = plain_line(line), bool(_MARKED_KEY.match(line.lstrip()))
            match = _NAMED.fullmatch(plain) or (_DASHED.fullmatch(plain) if is_marked else None)
            if match is None or not (
                is_marked or (_PLAIN_KEY.fullmatch(match["key"]) and len(match["key"].split()) <= 5)
            ):
                continue
            is_last = number + 1 == len(lines)
            if is_last or _begins_anew(lines[number + 1]):  # else the value goes on in the next line
                yield from self._defined(block, number, number, match["key"], match["answer"])

    def _defined(self, block: Block, first: int, last: int, key: str, answer: str) -> Iterator[Fact]:
        key = key.strip(' *_`"“”')
        if not 2 <= len(key) <= 40 or _points_elsewhere(key) or _LINKED.search(answer):
            return
        if answer.endswith(":") or len(answer) > _MOST_ANSWER:
            return
        heading = block.headings[-1] if block.headings else ""
        subject = key if heading in ("", self.title) or self.name in heading else f"{heading}: {key}"
        lines = (block.lines[0] + first, block.lines[0] + last + 1)
        yield from self._fact("definition", "definition", key, _ENDING.sub("", answer), lines, subject=subject)

    def _sentences(self, block: Block) -> Iterator[Fact]:
        for sentence in _SENTENCE.split(block.inline.plain):
            match = _IS.fullmatch(sentence.strip())
            if match is None or len(sentence) > 300 or _says_little(match["answer"]):
                continue
            if _points_elsewhere(match["subject"].removeprefix("The ").removeprefix("A ").removeprefix("An ")):
                continue
            first, blank, others = match["subject"].partition(" ")
            subject = first.lower() + blank + others if first in ("The", "A", "An") else match["subject"]
            when = _WHEN.fullmatch(match["answer"])
            if when:
                asked = {"subject": subject, "verb": match["verb"], "done": when["done"]}
                yield from self._fact("sentence", "when", subject, when["year"], block.lines, **asked)
            else:
                asked = {"subject": subject, "verb": match["verb"]}
                yield from self._fact("sentence", "sentence", subject, match["answer"], block.lines, **asked)

    def _code(self, block: Block) -> Iterator[Fact]:
        named = named_things(block.language, block.content)
        first = next((one for one in named if one.what == "declaration"), None)
        for one in named:
            begin = block.lines[0] + 1 + one.line
            lines = (begin, begin + 1 + one.text.count("\n"))
            yield from self._fact("code", one.what, one.name, one.text, lines, subject=one.name)
            if one is first:
                yield from self._fact("code", "first definition", self.path, one.name, lines)

    def _quoted(self, inline: Inline, lines: tuple[int, int]) -> str:
        """Without markup where that stands in the text, else as it is written, else nothing."""
        source = self.page.source(lines)
        if inline.plain in source:
            return inline.plain
        return inline.source if inline.source in source and not _LINKED.search(inline.source) else ""

    def _fact(
        self, kind: FactKind, wording: str, about: str, answer: str, lines: tuple[int, int], **parts: str
    ) -> Iterator[Fact]:
        """One where the answer stands in these lines as it is, and says something."""
        passage = self.page.source(lines)
        is_long = kind in ("heading", "list")
        if not is_long:
            answer = answer.strip()
            while wrapped := _WRAPPED.fullmatch(answer):
                answer = (wrapped[2] or wrapped[3]).strip()
        if not answer.strip() or answer not in passage or not any(map(str.isalnum, answer)):
            return
        if not is_long and wording != "declaration" and (answer.casefold() == about.casefold() or "\n" in answer):
            return
        if answer.count("(") != answer.count(")") or "\0" in answer:
            return
        line = self.first_line + lines[0]
        asked = questions(wording, self.path, self.title, **parts)
        if any("\n" in question or not question.isprintable() for question in asked):
            return
        yield Fact(kind, about, asked, answer, passage, self.path, line, line + lines[1] - lines[0] - 1)


def _says_little(answer: str) -> bool:
    """Of what follows "is": an adjective alone, a link, what goes on in the next line."""
    is_word = " " not in answer and answer.islower()
    return is_word or answer.endswith(":") or bool(_LINKED.search(answer) or _VAGUE.match(answer))


def _begins_anew(line: str) -> bool:
    return bool(_MARKED_KEY.match(line.lstrip()) or re.match(r"\s*[\w ]{2,38}[:：]\s", line))


def _points_elsewhere(subject: str) -> bool:
    words = subject.lower().split()
    if not words or not subject[0].isalnum():
        return True
    return words[0] in _POINTERS or bool(_CLAUSES & set(words))
