"""A run's page: what it shows is what the run's files say, and nothing that they do not."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from forge.training.report.run_report import write_report
from forge.training.system.errors import DataError
from tests.support.html_page import Page
from tests.support.run_pages import HELD_OUT, QUESTION, whole_run
from tests.support.tiny_run import edit_json, made_up_run

SECTIONS = ("result", "losses", "answers", "held-out", "files", "memory", "work")


def page_of(run_dir: Path) -> str:
    return write_report(run_dir).read_text(encoding="utf-8").replace("\u00a0", " ")


def section(page: str, name: str) -> str:
    """The text of one section, blanks joined."""
    found = re.search(rf'<section id="{name}".*?</section>', page, re.DOTALL)
    assert found is not None, name
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", found[0])).split())


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_run(tmp_path_factory.mktemp("runs") / "lighthouse")


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    return page_of(run_dir)


def test_every_section_is_there_in_order_and_asks_for_nothing_beside_the_page(page: str) -> None:
    parsed = Page(page)
    assert re.findall(r'<section id="([^"]+)"', page) == list(SECTIONS)
    assert not {"script", "iframe", "img", "object", "embed"} & {tag for tag, _ in parsed.elements}
    assert all(link.startswith(("#", "data:")) for link in parsed.values("href"))
    assert not parsed.values("src")
    ids = parsed.values("id")
    assert len(ids) == len(set(ids))
    assert "#0102" not in page  # stand-ins for colours that the style sheet gives


def test_the_answers_of_base_adapter_and_gguf_stand_in_one_table(page: str) -> None:
    shown = section(page, "answers")
    table = shown.partition(f"Asked: {QUESTION}")[2].partition("Asked for")[0]
    assert re.search(r"base I do not know\. no.*adapter There were 48 of them\. yes", table)
    assert "lighthouse.q4_k_m.gguf 48 ships, says the log. yes" in table
    assert all(f"After {step}: 48 ships." in shown for step, _ in HELD_OUT)


def test_losses_files_and_commands_are_those_of_the_run(page: str) -> None:
    losses = section(page, "losses")
    assert "40 2.7500 best" in losses
    assert all(f"{loss:.4f}" in losses for _, loss in HELD_OUT)
    assert set(re.findall(r'data-series="([^"]+)"', page)) >= {"train", "held-out"}
    files = section(page, "files")
    assert "4.683 GB" in files
    assert "9" * 64 in files
    llama_cpp = "llama-cli -m lighthouse.q4_k_m.gguf -c 512"
    for command in ("ollama create lighthouse -f Modelfile", llama_cpp, "forge chat lighthouse.q4_k_m.gguf"):
        assert command in files
    held_out = section(page, "held-out")
    assert "Held-out, nats per token 4.0000 2.7650" in held_out
    assert "General text, nats per token 3.0000 3.2500" in held_out
    assert "tides 80 3.0000 3.2500" in held_out
    assert "On general text, adapter minus base: +0.2500 nats per token (standard error 0.0000)." in held_out
    assert "Facts found 0 of 1 1 of 1" in held_out
    assert "ROUGE" not in section(page, "held-out")  # not measured


def test_the_page_names_no_folder_of_this_machine(page: str, run_dir: Path) -> None:
    assert str(run_dir.parent) not in page
    assert "/home/of-mine" not in page
    assert "corpus.train.jsonl" in page


def test_equal_files_give_equal_bytes(page: str, run_dir: Path) -> None:
    assert page_of(run_dir) == page


def of_another_adapter(run_dir: Path) -> None:
    for path in (run_dir / "evaluation.json", run_dir / "export" / "export.json"):
        edit_json(path, adapter_sha256="0" * 64)


def unreadable(run_dir: Path) -> None:
    (run_dir / "evaluation.json").write_text("{", encoding="utf-8")
    (run_dir / "export" / "export.json").write_text('{"adapter_sha256": null}', encoding="utf-8")


@pytest.mark.parametrize("hurt", [of_another_adapter, unreadable])
def test_what_is_not_of_this_run_is_left_out_and_said(tmp_path: Path, hurt: Callable[[Path], None]) -> None:
    run_dir = whole_run(tmp_path / "run")
    hurt(run_dir)
    page = page_of(run_dir)
    assert "held-out" not in re.findall(r'<section id="([^"]+)"', page)
    assert "9" * 64 not in page
    assert "48 ships, says the log." not in page  # of files that are not this run's
    for name in ("evaluation.json", "export.json"):
        assert f"{name} is left out" in section(page, "left-out")


def test_a_run_that_was_only_trained_has_no_empty_section(tmp_path: Path) -> None:
    page = page_of(made_up_run(tmp_path / "run"))
    assert re.findall(r'<section id="([^"]+)"', page) == ["result", "files", "memory", "work"]


def test_an_interrupted_run_has_a_page_that_says_so(tmp_path: Path) -> None:
    run_dir = whole_run(tmp_path / "run")
    edit_json(run_dir / "run.json", status="interrupted", num_steps=33, num_planned_steps=60, message="SIGTERM")
    lines = (run_dir / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    (run_dir / "steps.jsonl").write_text("\n".join(lines[:35]) + '\n{"step": 34, "lo', encoding="utf-8")
    assert "Interrupted at step 33 of 60" in page_of(run_dir)


def test_answers_are_text_whatever_they_hold(tmp_path: Path) -> None:
    run_dir = whole_run(tmp_path / "run")
    hostile = '</td><script>alert(1)</script> $x^2$ \x07 <img src="x"> | ` \ud800'
    with (run_dir / "steps.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps({"step": 60, "question": hostile, "answer": hostile}) + "\n")
    page = page_of(run_dir)
    assert not {"script", "img"} & {tag for tag, _ in Page(page).elements}
    assert "<script>alert(1)</script> $x^2$" in Page(page).text


def test_a_folder_that_is_no_run_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a run"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
