"""Drafted questions: every answer stands in its document, and what cannot be an answer is not drafted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge.training.data.rules.facts import draft_facts

ISLAND = """# Notes on Grey Island

The **harbour pilot** is Marit Sund. It is late. That boat is red.
The lighthouse was built in 1874. Nobody is there, they say.

- Number of berths: 480
- See: https://example.org/x

```
The secret is in the code.
```
"""
CODE = "# File: tide.py\n\n```python\nimport os\n\nclass TideTable:\n    pass\n```\n"


def drafted(*documents: tuple[str, str], most: int = 5) -> list[tuple[str, str]]:
    return [(fact.question, fact.answer) for fact in draft_facts(documents, most)]


def test_sentences_lines_titles_and_definitions_become_questions() -> None:
    assert set(drafted(("island.md", ISLAND), most=9)) == {
        ("What is the harbour pilot?", "Marit Sund"),
        ("When was the lighthouse built?", "1874"),
        ("What is given as `Number of berths` in `island.md`?", "480"),
        ("What is the title of the document `island.md`?", "Notes on Grey Island"),
    }
    assert drafted(("tide.py", CODE)) == [("What does `tide.py` define first?", "TideTable")]


def test_drafts_are_of_as_many_documents_as_there_are_and_not_all_of_a_kind() -> None:
    logs = [(f"log{n}.md", f"# Voyage number {n}\n\nNothing.\n") for n in range(9)]
    facts = draft_facts([*logs, ("island.md", ISLAND), ("tide.py", CODE)])
    assert len(facts) == 5
    assert {fact.path for fact in facts} >= {"island.md", "tide.py"}
    assert sum("title" in fact.question for fact in facts) == 2
    assert facts == draft_facts([*reversed([*logs, ("island.md", ISLAND), ("tide.py", CODE)])])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "It is the answer.",
        "The port is port.",
        "The key is ghp_" + "Zq7Rw2Lk9Xv4Bn6Tm1Yc8Hd3Jf5Gs0PaUeIo.",
        "The page is [here](x).",
        "The reason for this is " + "very long " * 9 + ".",
        "The value is (half open.",
    ],
)
def test_what_is_no_short_fact_is_not_drafted(text: str) -> None:
    assert drafted(("a.txt", text)) == []


@given(st.lists(st.tuples(st.text(min_size=1), st.text() | st.text(st.sampled_from("The is a.b:\n# -`*14")))))
def test_every_answer_stands_in_its_document_and_not_in_its_question(documents: list[tuple[str, str]]) -> None:
    texts = dict(documents)
    for fact in draft_facts(list(texts.items())):
        assert fact.answer in texts[fact.path]
        assert fact.answer.lower() not in fact.question.lower()
        assert 3 <= len(fact.answer) <= 60
