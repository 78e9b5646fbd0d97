"""Every rule on awkward Markdown: what it asks, what it answers, from which lines; answers are only cut out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge.training.data.corpus import build_corpus
from forge.training.data.rules.facts import Fact, draw_facts
from forge.training.data.rules.records import Source, group_facts, make_records

PATH = "docs/island.md"


def drawn(text: str, kind: str | None = None) -> list[tuple[str, str, int]]:
    return [(f.questions[0], f.answer, f.first_line) for f in draw_facts(PATH, text) if kind in (None, f.kind)]


def test_front_matter_is_read_as_yaml_and_keeps_its_lines() -> None:
    text = '---\ntitle: "Tide: a table"\nauthor:\n  name: Marit # who\ntags: [a, b]\n---\n# Tides\n'
    assert drawn(text) == [
        ("What is the `title` of `docs/island.md`?", "Tide: a table", 2),
        ("What is the `author.name` of `docs/island.md`?", "Marit", 4),
        ("What is the title of the document `docs/island.md`?", "Tides", 7),
    ]


@pytest.mark.parametrize(
    "text", ["---\na: [\n---\n# T\n", "+++\na = 1\n+++\n# T\n", "---\n*x\n---\n# T\n", "---\n&a [*a]\n---\n# T\n"]
)
def test_front_matter_that_is_no_yaml_mapping_is_passed_over(text: str) -> None:
    assert drawn(text) == [("What is the title of the document `docs/island.md`?", "T", 4)]


def test_nested_lists_are_one_list_and_each_definition_in_them_is_one() -> None:
    items = "- **Ferry**: two decks\n  1. `fuel` - diesel\n  2. see [here](x): no\n- [ ] Crew: nine\n"
    text = f"# Boats\n\n## Fleet\n\n{items}"
    assert drawn(text, "definition") == [
        ("What is given as `Fleet: Ferry` in `docs/island.md`?", "two decks", 5),
        ("What is given as `Fleet: fuel` in `docs/island.md`?", "diesel", 6),
        ("What is given as `Fleet: Crew` in `docs/island.md`?", "nine", 8),
    ]
    (listed,) = drawn(text, "list")
    assert listed == ("What does `docs/island.md` list under “Fleet”?", items.rstrip("\n"), 5)


def test_tables_with_pipes_are_asked_by_row_both_ways_and_escaped_pipes_are_no_answer() -> None:
    text = (
        "| Name | Port |\n|---|---|\n| alpha | `80` |\n| beta | `a \\| b` |\n| **gamma** | 80 |\n| x | 7 |\n| x | 8 |\n"
    )
    assert drawn(text) == [
        ("What is the Port of alpha?", "80", 3),
        ("For which Name is the Port a | b?", "beta", 4),
        ("What is the Port of gamma?", "80", 5),
    ], "80 is of two names, and x is two rows"


def test_code_fences_are_code_and_never_text() -> None:
    text = (
        "# K\n\nThe key is in `x`.\n\n"
        "````python\n# Heading: none\nLIMIT = 4\n\n\nclass Tide(Base):\n    '''Rises.'''\n\n"
        "    def fall(self,\n             by: int) -> None:\n        '''Falls.'''\n````\n\n```sh\nPORT: 80\n```\n"
    )
    assert [(question, answer) for question, answer, _ in drawn(text, "code")] == [
        ("What is `LIMIT` set to in `docs/island.md`?", "4"),
        ("How is `Tide` declared in `docs/island.md`?", "class Tide(Base)"),
        ("What does `docs/island.md` define first?", "Tide"),
        ("What does `Tide` in `docs/island.md` do?", "Rises."),
        ("How is `Tide.fall` declared in `docs/island.md`?", "def fall(self,\n             by: int) -> None"),
        ("What does `Tide.fall` in `docs/island.md` do?", "Falls."),
    ]
    assert not any("Heading" in question or "PORT" in question for question, *_ in drawn(text))


@pytest.mark.parametrize(
    ("language", "code", "answer"),
    [
        ("go", "func (s *S) Open(p string) error {\n}", "func (s *S) Open(p string) error"),
        ("rust", "pub fn open(p: &str) -> u8 {", "pub fn open(p: &str) -> u8"),
        ("ts", "export class Tide extends Sea {", "export class Tide extends Sea"),
        ("python", "def old(a):\n    print a", "def old(a)"),
    ],
)
def test_other_languages_are_read_by_line(language: str, code: str, answer: str) -> None:
    assert answer in [found for _, found, _ in drawn(f"```{language}\n{code}\n```\n")]


def test_html_and_links_are_no_answers() -> None:
    text = "<div>\nPort: 80\n</div>\n\n# A\n\nBoat: <b>red</b>\n\nPage: [here](x)\n\n<!-- Old: 3 -->\n"
    assert drawn(text, "sentence") == []
    assert drawn(text, "definition") == [("What is given as `Boat` in `docs/island.md`?", "red", 7)]


def test_lines_count_alike_in_crlf() -> None:
    text = "# T\n\nThe pilot is Marit Sund.\n\n- Berths: 480\n"
    crlf = text.replace("\n", "\r\n")
    assert drawn(crlf, "definition") == drawn(text, "definition")
    assert drawn(crlf, "sentence") == drawn(text, "sentence") == [("What is the pilot?", "Marit Sund", 3)]


def test_chinese_and_japanese_are_asked_by_their_own_headings_and_keys() -> None:
    about = "港口有四百八十个泊位，夜间关闭，早晨六点重新开放，冬天则在七点开放。"
    text = f"# 港口手册\n\n{about}\n\n- 引水员：玛丽特\n\n| 船 | 色 |\n|--|--|\n| 甲 | 红 |\n"
    assert drawn(text) == [
        ("What is the title of the document `docs/island.md`?", "港口手册", 1),
        ("What does `docs/island.md` say about “港口手册”?", about, 3),
        ("What is given as `引水员` in `docs/island.md`?", "玛丽特", 5),
        ("What is the 色 of 甲?", "红", 9),
        ("For which 船 is the 色 红?", "甲", 9),
    ]


def test_a_term_with_its_definition_below_and_values_that_go_on_are_told_apart() -> None:
    text = "Tide\n: the sea rises\n\nNote: this goes\non and on\n\n**Status:** Accepted\n**Date:** 2025-01-02\n"
    assert [row[:2] for row in drawn(text, "definition")] == [
        ("What is given as `Tide` in `docs/island.md`?", "the sea rises"),
        ("What is given as `Status` in `docs/island.md`?", "Accepted"),
        ("What is given as `Date` in `docs/island.md`?", "2025-01-02"),
    ]


_PIECES = st.sampled_from(
    [
        "# H\n",
        "## A: b\n\n",
        "- **k**: v\n",
        "  - x\n",
        "| a | b |\n|---|---|\n| c | d \\| e |\n",
        "```python\nX = 1\n```\n",
        "The a b is C d 4.\n",
        "> q: r\n",
        "\r\n",
        "\n\n",
        "---\nk: v\n---\n",
        "<b>\n",
        "Term\n: what\n",
        "港：口\n",
        "def f(",
        "\t",
        "`",
    ]
)
_TEXTS = st.lists(_PIECES | st.text(max_size=12), max_size=14).map("".join)


@given(st.lists(_TEXTS, min_size=1, max_size=3))
def test_every_answer_stands_in_its_document_in_the_lines_that_it_names(texts: list[str]) -> None:
    sources = [Source(f"{n}.md", text, f"Set out {n}") for n, text in enumerate(texts)]
    by_path = {source.path: source.text for source in sources}
    for record in make_records(sources, 4).records:
        text = by_path[record.path]
        assert record.quotes
        assert all(quote in text for quote in record.quotes)
        assert record.output == "\n\n".join(record.quotes) or record.output == "\n\n".join(reversed(record.quotes))
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")[record.first_line - 1 : record.last_line]
        unified = [quote.replace("\r\n", "\n").replace("\r", "\n") for quote in record.quotes]
        assert all(quote in "\n".join([*lines, ""]) for quote in unified)


def fact(subject: str, answer: str, path: str = "a.md", lines: tuple[int, int] = (1, 1)) -> Fact:
    return Fact("definition", subject, (f"{subject}?",), answer, answer, path, *lines)


def test_one_fact_in_other_words_in_another_document_or_in_the_same_lines_is_one_group() -> None:
    facts = [
        fact("the harbour pilot", "Marit Sund"),
        fact("pilot of the port", "marit  SUND.", "b.md"),
        fact("cook", "Marit Sund", "c.md"),
        fact("list", "- a\n- b", "c.md", (4, 9)),
        fact("b", "c", "c.md", (9, 9)),
    ]
    first, other, cook, whole, part = group_facts(facts)
    assert first == other
    assert whole == part
    assert len({first, cook, whole}) == 3


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_no_question_that_is_held_out_has_its_fact_among_those_trained(tmp_path: Path) -> None:
    root = tmp_path / "r"
    root.mkdir()
    for n in range(30):
        shared = "The harbour pilot is Marit Sund.\n" if n % 2 else f"Berths: {n}\n"
        (root / f"{n}.md").write_text(
            f"# Page {n}\n\nKeeper of {n} is one of {n * 7}, and so on for ever.\n\n## B{n}\n\n{shared}"
        )
    outputs = []
    for name in ("c", "d"):
        report = build_corpus(root, tmp_path / f"{name}.jsonl", validation_share=0.2, num_wordings=3)
        outputs.append([output.sha256 for output in report.outputs])
    assert outputs[0] == outputs[1], "the same documents give the same records"
    train, held = rows(tmp_path / "c.train.jsonl"), rows(tmp_path / "c.validation.jsonl")
    facts = [{row["made_from"].get("fact") for row in side} - {None} for side in (train, held)]
    assert all(facts)
    assert not facts[0] & facts[1]
    documents = [
        {r["made_from"]["document"] for r in side if r["made_from"]["kind"] == "document"} for side in (train, held)
    ]
    assert all(documents)
    assert not documents[0] & documents[1]
    assert documents[1].isdisjoint(row["made_from"]["document"] for row in train)
    assert {row["instruction"] for row in train}.isdisjoint(row["instruction"] for row in held)
    assert {row["made_from"]["document"] for row in held if "fact" in row["made_from"]} & documents[0], (
        "of trained ones too"
    )


def test_code_files_are_named_by_their_own_lines(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "tide.py").write_text("LIMIT = 4\n\n\ndef fall() -> None:\n    '''Falls.'''\n")
    build_corpus(tmp_path / "r", tmp_path / "c.jsonl", num_wordings=1)
    lines = {row["instruction"]: row["made_from"]["lines"] for row in rows(tmp_path / "c.jsonl")}
    assert lines["What is `LIMIT` set to in `tide.py`?"] == [1, 1]
    assert lines["How is `fall` declared in `tide.py`?"] == [4, 4]
    assert lines["Set out the ideas, facts and principles of the document `tide.py`"] == [1, 5]
