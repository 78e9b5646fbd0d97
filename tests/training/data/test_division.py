"""Dividing loses nothing and prefers headings."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from forge.training.data.examples import borders, divide


def starts(text: str) -> np.ndarray:
    return np.arange(len(text), dtype=np.int64)  # one token a character


@given(st.text(alphabet="ab #`\n~", max_size=300), st.integers(1, 40))
def test_the_parts_joined_are_the_document_and_none_is_too_long(text: str, most: int) -> None:
    parts = divide(text, starts(text), most)
    assert "".join(parts) == text
    assert all(len(part) <= most for part in parts)
    assert all(parts) or text == ""


def test_a_document_is_divided_at_its_headings() -> None:
    text = "# One\n" + "a" * 30 + "\n\n# Two\n" + "b" * 30 + "\n\n# Three\n" + "c" * 30 + "\n"
    assert [part.split("\n")[0] for part in divide(text, starts(text), 60)] == ["# One", "# Two", "# Three"]


def test_a_hash_inside_fenced_code_is_no_heading() -> None:
    text = "# A\n```\n# not a heading\n```\n# B\n"
    assert borders(text)[0] == [text.index("# B")]


def test_a_long_text_without_any_border_is_divided_at_tokens() -> None:
    assert divide("x" * 10, starts("x" * 10), 4) == ["xxxx", "xxxx", "xx"]
