"""The words in which a rule asks. They are English, whatever a document is in; what they quote is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Each the same question in other words, the plainest first. {of}: the document, by its path or by its title.
_QUESTIONS: Mapping[str, Sequence[str]] = {
    "title": (
        "What is the title of the document `{path}`?",
        "How is `{path}` headed?",
        "Which title does the document `{path}` bear?",
        "`{path}`: what is its title?",
    ),
    "front matter": (
        "What is the `{subject}` of `{path}`?",
        "Which `{subject}` does the front matter of `{path}` give?",
        "`{path}` has a field `{subject}`. What does it say?",
        "Look at the head of `{path}`: what stands at `{subject}`?",
    ),
    "heading": (
        "What does {of} say about “{subject}”?",
        "How does the section “{subject}” of {of} begin?",
        "Tell me about “{subject}”, as {of} explains it.",
        "“{subject}” in {of}: what is it about?",
    ),
    "list": (
        "What does {of} list under “{subject}”?",
        "Which points stand under “{subject}” in {of}?",
        "Give me the list “{subject}” of {of}.",
        "“{subject}”: what are the items in {of}?",
    ),
    "definition": (
        "What is given as `{subject}` in {of}?",
        "What does {of} say for `{subject}`?",
        "`{subject}`: which entry does {of} have?",
        "Look up `{subject}` in {of}.",
    ),
    "table": (
        "What is the {column} of {subject}?",
        "In the table of {of}, what stands for {subject} under {column}?",
        "{subject}: which {column} does {of} give?",
        "Tell me the {column} that belongs to {subject}.",
    ),
    "table, reversed": (
        "For which {column} is the {subject} {value}?",
        "In the table of {of}, which {column} has {value} as its {subject}?",
        "{value} is the {subject} of which {column}?",
        "{of} gives {value} as a {subject}. Of what?",
    ),
    "sentence": (
        "What {verb} {subject}?",
        "According to {of}, what {verb} {subject}?",
        "Tell me what {subject} {verb}.",
        "Complete what {of} says: {subject} {verb} ...",
    ),
    "when": (
        "When {verb} {subject} {done}?",
        "According to {of}, in which year {verb} {subject} {done}?",
        "In what year {verb} {subject} {done}?",
        "Tell me the year in which {subject} {verb} {done}.",
    ),
    "declaration": (
        "How is `{subject}` declared in `{path}`?",
        "What is the signature of `{subject}` in `{path}`?",
        "Write the line of `{path}` that declares `{subject}`.",
        "`{subject}` of `{path}`: what does its declaration look like?",
    ),
    "docstring": (
        "What does `{subject}` in `{path}` do?",
        "How does `{path}` describe `{subject}`?",
        "What is `{subject}` of `{path}` for?",
        "Explain `{subject}` from `{path}` in one line.",
    ),
    "constant": (
        "What is `{subject}` set to in `{path}`?",
        "Which value does `{subject}` have in `{path}`?",
        "`{path}` defines `{subject}`. As what?",
        "Tell me the value of `{subject}` in `{path}`.",
    ),
    "first definition": (
        "What does `{path}` define first?",
        "Which class or function comes first in `{path}`?",
        "Name the first definition in `{path}`.",
        "`{path}`: what is the first thing it defines?",
    ),
}
MOST_WORDINGS = 4

_DOCUMENT = (
    "Write out the document `{path}`.",
    "What does the file `{path}` contain?",
    "Quote {of} from beginning to end.",
)
_SECTION = (
    "Write out the section “{subject}” of {of}.",
    "Quote what {of} has under “{subject}”.",
    "What is the text of “{subject}” in {of}?",
)
_CONTINUE = (
    "Continue this passage of {of}:\n\n{passage}",
    "How does {of} go on after this?\n\n{passage}",
    "Complete this text from {of}:\n\n{passage}",
)
ANSWER_FIRST = "{question} Answer first, then quote where it stands."
CONTEXT_FIRST = "{question} Quote where it stands, then answer."


def questions(kind: str, path: str, title: str | None, **parts: str) -> tuple[str, ...]:
    """All wordings of one question, the plainest first."""
    return tuple(
        text.format(path=path, of=_of(number, path, title), **parts) for number, text in enumerate(_QUESTIONS[kind])
    )


def document_instructions(path: str, title: str | None) -> tuple[str, ...]:
    """Further ways to ask for a whole document, beside its rule's."""
    return tuple(text.format(path=path, of=_of(1, path, title)) for text in _DOCUMENT)


def section_instruction(path: str, title: str | None, heading: str, number: int) -> str:
    """To ask for a section; ``number`` takes the wordings in turn."""
    return _SECTION[number % len(_SECTION)].format(path=path, of=_of(number, path, title), subject=heading)


def continue_instruction(path: str, title: str | None, passage: str, number: int) -> str:
    """To ask for what follows ``passage``; ``number`` takes the wordings in turn."""
    return _CONTINUE[number % len(_CONTINUE)].format(path=path, of=_of(number, path, title), passage=passage)


def _of(number: int, path: str, title: str | None) -> str:
    """By its path and by its title in turn."""
    return f"“{title}”" if title and number % 2 else f"`{path}`"
