"""Near duplicates: exact against all pairs compared, and without comparing all pairs."""

from __future__ import annotations

import random
import time
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge.training.data.duplicates import deduplicate
from tests.support.similarity import jaccard


def names(texts: list[str]) -> list[str]:
    return [f"{i:04}" for i in range(len(texts))]


def variants(seed: int) -> list[str]:
    """Texts made from a few by inserting and deleting words: many of every similarity."""
    choose = random.Random(seed)
    words = list("abcdefgh") if seed % 2 else [f"w{i}" for i in range(200)]
    originals = [choose.choices(words, k=choose.randrange(1, 60)) for _ in range(choose.randrange(1, 5))]
    texts = []
    for _ in range(choose.randrange(2, 40)):
        text = list(choose.choice(originals))
        for _ in range(choose.randrange(6)):
            at = choose.randrange(len(text) + 1)
            if choose.random() < 0.5:
                text[at:at] = choose.choices(words, k=choose.randrange(1, 6))
            else:
                del text[at : at + choose.randrange(1, 6)]
        texts.append(" ".join(text) or "nothing")
    return texts


@settings(max_examples=150)
@given(st.integers(min_value=0, max_value=10**6))
def test_the_result_is_that_of_comparing_all_pairs(seed: int) -> None:
    texts = variants(seed)
    found = deduplicate(names(texts), texts)
    assert sorted([*found.kept, *(int(d.path) for d in found.duplicates)]) == list(range(len(texts)))
    for duplicate in found.duplicates:
        expected = jaccard(texts[int(duplicate.path)], texts[int(duplicate.kept)])
        assert expected >= 0.8
        assert duplicate.similarity == pytest.approx(expected, abs=1e-4)
    joined = {i: {i} for i in found.kept}  # groups by comparing everything with everything
    for i, j in combinations(found.kept, 2):
        near = jaccard(texts[i], texts[j])
        assert near < 0.8
        if near >= 0.5 and joined[i] is not joined[j]:
            joined[i] |= joined[j]
            for member in joined[j]:
                joined[member] = joined[i]
    expected_groups = {frozenset(group) for group in joined.values()}
    numbers = dict(zip(found.kept, found.groups, strict=True))
    assert {frozenset(i for i in numbers if numbers[i] == g) for g in found.groups} == expected_groups


@pytest.mark.parametrize(
    ("other", "is_exact"),
    [
        ("one two\r\nthree\r\n", True),
        ("one two\rthree\r", True),
        ("one  two\nthree\n", False),
        ("one two\nthree", False),
    ],
)
def test_exact_means_equal_but_for_line_ends_and_of_equal_documents_the_first_stays(other: str, is_exact: bool) -> None:
    found = deduplicate(["a", "b", "c"], ["one two\nthree\n", "something else", other])
    assert found.kept == [0, 1]
    assert [(d.path, d.kept, d.exact) for d in found.duplicates] == [("c", "a", is_exact)]


LOOP = "total = 0\nfor row in rows:\n    total += row.area\n{}print(total, row.name)\n"


def test_files_that_differ_in_what_stands_under_what_are_both_kept_on_one_side() -> None:
    found = deduplicate(["inner", "outer"], [LOOP.format("    "), LOOP.format("")])
    assert (found.kept, found.duplicates) == ([0, 1], [])
    assert found.groups[0] == found.groups[1]


@pytest.mark.parametrize("width", ["  ", "\t", "        "])
def test_the_width_of_an_indentation_does_not_make_another_document(width: str) -> None:
    text = LOOP.format("    ")
    found = deduplicate(["a", "b"], [text, text.replace("    ", width)])
    assert [(d.similarity, d.exact) for d in found.duplicates] == [(1.0, False)]


def test_of_near_documents_the_longest_stays() -> None:
    text = " ".join(f"word{i}" for i in range(100))
    found = deduplicate(["a", "b"], [text, text + " and a few more"])
    assert found.kept == [1]
    assert [(d.path, d.kept, d.exact) for d in found.duplicates] == [("a", "b", False)]


def test_the_threshold_itself_counts_as_similar() -> None:
    words = [f"w{i}" for i in range(8)]  # 4 shingles, and 5 with one more word: 4/5 is 0.8
    texts = [" ".join(words), " ".join([*words, "last"])]
    assert jaccard(*texts) == 0.8
    assert deduplicate(["a", "b"], texts).kept == [1]


def test_no_documents_and_texts_shorter_than_a_shingle_are_no_problem() -> None:
    assert deduplicate([], []).kept == []
    assert deduplicate(["a", "b", "c"], ["one", "two", "one two"]).kept == [0, 1, 2]


def template_texts(num: int, shared: float, *, varied: bool) -> list[str]:
    """``num`` texts of about 300 words of which the share ``shared`` is the same in all."""
    choose = random.Random(1)
    template = " ".join(f"t{choose.randrange(9999)}" for _ in range(int(300 * shared)))
    own = 300 - int(300 * shared)
    lengths = [choose.randrange(1, 3 * own) if varied else own for _ in range(num)]
    return [f"{template} " + " ".join(f"w{choose.randrange(9999)}" for _ in range(length)) for length in lengths]


@pytest.mark.parametrize("varied", [False, True])
@pytest.mark.parametrize("shared", [0.3, 0.7, 0.85])
def test_boilerplate_in_every_document_does_not_make_the_time_quadratic(shared: float, varied: bool) -> None:
    def seconds(num: int) -> float:
        texts = template_texts(num, shared, varied=varied)
        started = time.process_time()
        deduplicate(names(texts), texts)
        return time.process_time() - started

    seconds(200)  # imports and caches
    assert seconds(2400) < 8 * max(seconds(600), 0.02)  # 4 times as many: quadratic would be 16
