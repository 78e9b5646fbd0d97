"""Claims about how an answer is shown while it comes."""

from __future__ import annotations

import pytest

from forge.training.export.answer_text import AnswerText, harmless

TEXT = (
    "The keeper counts the ships, and there were forty-eight of them.\n\n  - one\n  - two and a-very-long-word-indeed"
)


def shown(text: str, size: int, width: int | None, column: int = 0) -> list[str]:
    """What is written of a text that comes in pieces of ``size`` characters."""
    written: list[str] = []
    answer = AnswerText(written.append, width, column)
    for begin in range(0, len(text), size):
        answer.add(text[begin : begin + size])
    answer.end()
    return written


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_lines_are_broken_between_words_however_the_pieces_fall(size: int) -> None:
    lines = "".join(shown(TEXT, size, 20)).split("\n")
    assert max(len(line) for line in lines if "indeed" not in line) <= 20
    assert " ".join(lines).split() == TEXT.split()
    assert "  - one" in lines  # the answer's own lines stay


def test_the_first_line_is_shorter_by_what_stands_before_it() -> None:
    assert "".join(shown("aaaa bbbb cccc", 2, 10, column=6)) == "aaaa\nbbbb cccc\n"


@pytest.mark.parametrize("width", [None, 60])
def test_blank_lines_at_the_end_are_left_out(width: int | None) -> None:
    assert "".join(shown("One\n\ntwo words\n \n\n", 1, width)) == "One\n\ntwo words\n"


def test_elsewhere_than_on_a_terminal_each_piece_is_written_at_once_and_as_it_is() -> None:
    assert shown("ab cd ef", 1, None) == ["a", "b", " c", "d", " e", "f", "\n"]
    assert "".join(shown(TEXT, 5, None)) == TEXT + "\n"


def test_what_could_command_the_terminal_is_not_written() -> None:
    assert harmless("a\x1b[2Jb\x9bc\nd\te é🔥") == "a[2Jbc\nd\te é🔥"
