"""Questions and answers drawn from documents by rule: drafts, for a person to edit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from forge.training.system.secrets import credential_rule

_MOST_CHARACTERS = 200_000  # of a document that are looked at
_MOST_ANSWER = 60  # characters
_FENCED = re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.MULTILINE | re.DOTALL)
_TITLE = re.compile(r"^#\s+(.+?)\s*#*$", re.MULTILINE)
_DEFINED = re.compile(r"^(?:class|def|func|fn|function)\s+(\w{3,})", re.MULTILINE)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n\s*\n|\n(?=\s*(?:[-*+>|#]|\d+[.)])\s)")
_BULLET = re.compile(r"^\s*(?:[-*+>]|\d+[.)])\s+")
_IS = re.compile(
    r"(?P<the>The |A |An )?(?P<subject>[\w'’-]+(?: [\w'’-]+){0,5}) (?P<verb>is|was|are|were)"
    r" (?P<answer>[^,;:()!?]{2,60}?)\.?"
)
_NAMED = re.compile(r"(?P<key>[A-Z][\w'’ -]{2,30}):\s+(?P<answer>[^:;|]{2,60})")
# As a first word: the subject is named elsewhere.
_POINTERS = frozenset(
    {"it", "this", "that", "there", "he", "she", "they", "we", "you", "i", "what", "if", "when", "here"}
    | {"these", "those", "which", "who", "how", "why", "each", "one", "all", "some", "and", "but", "or", "so"}
    | {"then", "because", "while", "as", "to", "in", "on", "at", "by", "for", "with", "from", "not", "no", "our"}
    | {"your", "their", "its", "his", "her"}
)
_VAGUE = re.compile(r"^(?:not|no|also|only|very|more|less|used|done|made|being|now|still|just|it|this|that)\b", re.I)
_TITLE_IS, _NAMED_AS, _DEFINES = "What is the title of the document", "What is given as", "What does"
_MARKUP = re.compile(r"[\[\]<>|{}\\#=]|https?:")


@dataclass(frozen=True)
class DraftFact:
    """``answer`` stands, letter by letter, in the document ``path``."""

    question: str
    answer: str
    path: str


def draft_facts(documents: Sequence[tuple[str, str]], most: int = 5) -> list[DraftFact]:
    """At most ``most`` drafts from (path, text), the likeliest to be checkable first, of as many documents as can be.

    Sentences such as ``The port is 8080``, lines such as ``Version: 3.1``, titles and first definitions. The same
    documents give the same drafts.
    """
    ranked: list[tuple[int, int, str, DraftFact]] = []
    for path, text in documents:
        found = sorted(_drawn(path, text[:_MOST_CHARACTERS]), key=lambda rated: -rated[0])
        distinct = {fact.question: (score, fact) for score, fact in reversed(found)}.values()
        own = sorted(distinct, key=lambda rated: -rated[0])[:most]
        ranked += [(place, -score, path, fact) for place, (score, fact) in enumerate(own)]
    ranked.sort(key=lambda row: row[:3])  # the best of each document before anybody's second
    chosen: list[DraftFact] = []
    of_a_kind: Counter[str] = Counter()
    for limit in (2, most):  # two of a kind first: a repository repeats itself
        for *_, fact in ranked:
            kind = next((rule for rule in (_TITLE_IS, _NAMED_AS, _DEFINES) if fact.question.startswith(rule)), "")
            is_new = all(fact.question != other.question and fact.answer != other.answer for other in chosen)
            if is_new and of_a_kind[kind] < limit and len(chosen) < most:
                chosen.append(fact)
                of_a_kind[kind] += 1
    return chosen


def _drawn(path: str, text: str) -> Iterator[tuple[int, DraftFact]]:
    """Drafts and how likely each can be checked."""
    name = path.rpartition("/")[2]
    for pattern, question in (
        (_TITLE, f"{_TITLE_IS} `{path}`?"),
        (_DEFINED, f"{_DEFINES} `{path}` define first?"),
    ):
        match = pattern.search(text if pattern is _DEFINED else _FENCED.sub("", text))
        if match and name not in match[1]:
            yield from _usable(1, question, match[1], path, text)
    for sentence in _SENTENCE.split(_FENCED.sub("", text)):
        plain = _BULLET.sub("", sentence.strip()).replace("**", "").replace("`", "")
        if _MARKUP.search(plain) or len(plain) > 160:
            continue
        match = _IS.fullmatch(plain)
        if match and not _points_elsewhere(match["subject"]) and not _VAGUE.match(match["answer"]):
            question = f"What {match['verb']} {(match['the'] or '').lower()}{match['subject']}?"
            yield from _usable(3, question, match["answer"], path, text)
        match = _NAMED.fullmatch(plain)
        if match:
            yield from _usable(2, f"{_NAMED_AS} `{match['key']}` in `{path}`?", match["answer"], path, text)


def _points_elsewhere(subject: str) -> bool:
    words = subject.lower().split()
    return words[0] in _POINTERS or bool({"that", "which", "who", "is", "are"} & set(words)) or not subject[0].isalnum()


def _usable(score: int, question: str, answer: str, path: str, text: str) -> Iterator[tuple[int, DraftFact]]:
    answer = answer.strip(" .*_`'\"")
    if not 3 <= len(answer) <= _MOST_ANSWER or len(answer.split()) > 8 or answer not in text:
        return
    if answer.count("(") != answer.count(")"):
        return
    if answer.lower() in question.lower() or not (question + answer).isprintable():
        return
    if credential_rule(answer) or credential_rule(question):
        return
    score += 3 * bool(re.search(r"\d", answer)) + bool(re.search(r"[A-Z]", answer[1:])) + (len(answer.split()) <= 4)
    yield score, DraftFact(question, answer, path)
