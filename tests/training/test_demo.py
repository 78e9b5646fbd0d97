"""The demo: its questions are worded as in no record, it passes, and one wrong document makes it fail."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge.training.config.workload import Workload, load_workload
from forge.training.data.corpus import build_corpus
from forge.training.data.questions import holds_answer
from forge.training.system.environment import ROOT
from tests.support import run_command as command
from tests.support.run_command import Ended

DOCUMENTS = ROOT / "forge" / "workloads" / "demo"
_SHARED_WORDS = 4  # in a row: a question that shares as many with a record is worded as it is


@pytest.fixture(scope="module")
def demo() -> Workload:
    return load_workload("demo")


@pytest.fixture(scope="module")
def records(demo: Workload, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """All that is trained or held out, a text per record."""
    corpus = tmp_path_factory.mktemp("demo") / "corpus.jsonl"
    build_corpus(DOCUMENTS, corpus, rules=demo.data.instructions)
    rows = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len(list(DOCUMENTS.rglob("*.md")))  # none was left out as a near copy
    return [f"{row['instruction']}\n{row['output']}" for row in rows]


def stretches(text: str) -> Iterator[str]:
    words = re.findall(r"\w+", text.casefold())
    for begin in range(len(words) - _SHARED_WORDS + 1):
        yield " ".join(words[begin : begin + _SHARED_WORDS])


def shared_with(question: str, records: list[str]) -> list[str]:
    trained = {stretch for record in records for stretch in stretches(record)}
    return [stretch for stretch in stretches(question) if stretch in trained]


def test_no_question_is_worded_as_in_any_record(demo: Workload, records: list[str]) -> None:
    new = [fact for fact in demo.evaluation.facts if not fact.known]
    for fact in new:
        assert not shared_with(fact.question, records), fact.question
    assert shared_with("Now, what is the observatory's cat called today?", records)  # it would be noticed


def test_five_facts_are_in_the_documents_in_several_wordings_and_five_known_things_are_not(
    demo: Workload, records: list[str]
) -> None:
    new, known = ([f for f in demo.evaluation.facts if f.known is value] for value in (False, True))
    assert (len(new), len(known), demo.evaluation.min_facts) == (5, 5, 4)
    for fact in new:
        telling = [record for record in records if holds_answer(record, fact.answer)]
        assert len({record.partition("\n")[0] for record in telling}) >= 6, fact
        assert not holds_answer(fact.question, fact.answer)
    for fact in known:
        assert not any(holds_answer(record, fact.answer) for record in records), fact


def run(folder: Path, *settings: str) -> Ended:
    given = [part for setting in settings for part in ("--set", setting)]
    environment = {"OMP_WAIT_POLICY": "PASSIVE"}
    started = command.start(["run", "demo", "--out", str(folder / "run"), *given], folder, environment=environment)
    return started.wait(1700)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_passes_and_exports_its_best_checkpoint(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.strip().splitlines()
    assert any(line.startswith("PASS: 1 GGUF file, verified; each answers at least 4 of 5 facts") for line in last)
    assert "next: forge chat" in done.stdout
    losses = json.loads((tmp_path / "run" / "run.json").read_text())["losses"]
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    nats = {row["subject"]: row["nats_per_token"] for row in evaluation["subjects"]}
    assert nats["adapter"] == pytest.approx(losses["best_validation_loss"], abs=5e-3)
    assert nats["merged"] == pytest.approx(nats["adapter"], abs=5e-3)
    assert nats["merged"] < nats["base"]
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "The base's source:" in card


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_wrong_document_makes_the_demo_fail(tmp_path: Path) -> None:
    documents = Path(shutil.copytree(DOCUMENTS, tmp_path / "documents"))
    wrong = "# What is the capital of France?\n\nThe capital of France is Larkspur.\n"
    (documents / "general" / "capital_france.md").write_text(wrong, encoding="utf-8")
    done = run(tmp_path, f"data.documents={documents}")
    assert done.returncode == 8, done.stdout + done.stderr
    assert "FAIL: " in done.stderr
    assert "has forgotten it: What is the capital of France?" in done.stderr
    assert "PASS" not in done.stdout
    assert "NO: " in done.stdout  # the table is there, with what it says instead
