"""The table of faults names tests that exist, and each of its lines is complete."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from forge.training.system.environment import ROOT

ROWS = [line for line in (ROOT / "tests" / "faults.md").read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
HEAD = ("| fault | what the old code did | test |", "|---|---|---|")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


@cache
def names_in(path: Path) -> set[str]:
    """The tests that pytest collects from a file: functions at its top."""
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


def faults_of(row: str) -> list[str]:
    """What is wrong with a line of the table."""
    cells = [cell.strip() for cell in row.strip().removeprefix("|").removesuffix("|").split("|")]
    if len(cells) != 3 or not all(cells):
        return ["not three filled cells"]
    if TEST.sub("", cells[2]).strip(", "):
        return [f"no test, but {cells[2]}"]
    named = TEST.findall(cells[2])
    return [f"no {path}::{name}" for path, name in named if not is_test(path, name)] or ([] if named else ["no test"])


def is_test(path: str, name: str) -> bool:
    return (ROOT / path).is_file() and name in names_in(ROOT / path)


@pytest.mark.parametrize("row", [row for row in ROWS if row not in HEAD])
def test_each_fault_has_a_test_that_exists(row: str) -> None:
    assert faults_of(row) == []


def test_the_table_is_read() -> None:
    assert ROWS.count(HEAD[0]) == ROWS.count(HEAD[1]) >= 8
    assert len(set(ROWS)) == len(ROWS) - 2 * (ROWS.count(HEAD[0]) - 1), "a line twice"


@pytest.mark.parametrize(
    "row",
    [
        "| fault | old |  |",
        "| fault | old | `tests/test_faults.py::test_of_another_name` |",
        "| fault | old | `tests/test_absent.py::test_the_table_is_read` |",
        "| fault | old | `tests/test_faults.py::test_the_table_is_read` and by hand |",
        "| fault | `tests/test_faults.py::test_the_table_is_read` |",
    ],
)
def test_a_line_that_is_incomplete_or_stale_is_found(row: str) -> None:
    assert faults_of(row)
