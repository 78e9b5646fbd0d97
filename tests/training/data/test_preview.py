"""Claims about the preview: what is masked cannot be mistaken, and what is shown stands for the whole corpus."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from forge.training.config.workload import Workload
from forge.training.data.preview import Preview, preview_workload, print_preview
from tests.support.tiny_model import shared_base

TRICKY = "[![Build][button]][build]\ntrained | not so\nmasked  | nor so\n[/bold] :smile: \x1b[2K\rmasked  | hm"
LONG = "# Part\n\n" + "words of a long document, " * 30 + "\n\n"


def preview(folder: Path, answers: list[str], num_examples: int = 3, **data: Any) -> Preview:
    rows = [{"instruction": f"Recite [the {n}th]", "output": answer} for n, answer in enumerate(answers, 1)]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    settings = {"train": str(folder / "t.jsonl"), "validation_share": 0, "max_length": 512, **data}
    work = Workload.model_validate({"name": "w", "model": {"path": str(shared_base())}, "data": settings})
    return preview_workload(work, shared_base(), num_examples=num_examples)


def printed(shown: Preview, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, soft_wrap=True, highlight=False)
    print_preview(shown, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().split("\n--- ", 1)[1].split("\n")[1:-1]


@pytest.mark.parametrize("width", [40, 100])
def test_every_row_of_a_document_is_marked_whatever_it_holds(tmp_path: Path, width: int) -> None:
    rows = printed(preview(tmp_path, [TRICKY]), width)
    assert all(re.match(r"(trained|masked ) \| ", row) for row in rows)
    assert not any(character in row for row in rows for character in "\x1b\r")
    trained = "".join(row[10:] for row in rows if row.startswith("trained | "))
    assert re.sub(r"\s", "", trained) == re.sub(
        r"\s", "", TRICKY.replace("\x1b", r"\x1b").replace("\r", r"\r") + "<|im_end|>"
    )
    assert any("Recite [the 1th]" in row for row in rows if row.startswith("masked  | "))


def test_what_is_shown_is_spread_over_the_documents(tmp_path: Path) -> None:
    answers = [LONG * 9] + [f"It counts {n} ships." for n in range(2, 12)]
    names = [name for name, _ in preview(tmp_path, answers, max_length=160).shown]
    assert [name.partition(" part ")[0] for name in names] == ["line 2", "line 6", "line 10"]
    (name,) = (name for name, _ in preview(tmp_path, answers[:1], max_length=160).shown)
    assert name.startswith("line 1 part 1/")
    assert preview(tmp_path, answers, 0).shown == []
