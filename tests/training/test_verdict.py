"""What speaks against a run: facts known before, not learnt or forgotten, and a held-out loss that did not fall."""

from __future__ import annotations

from typing import Any

import pytest

from forge.training.config.workload import EvaluationSection
from forge.training.data.questions import holds_answer
from forge.training.evaluation.record import Evaluation, FactAnswer, SubjectResult
from forge.training.pipeline import Outcome, find_faults
from forge.training.system.errors import CheckError

NEW, KNOWN = ("a?", "b?"), ("paris?",)


def wanted(min_facts: int | None = None) -> EvaluationSection:
    facts = [{"question": q, "answer": "x"} for q in NEW]
    facts += [{"question": q, "answer": "Paris", "known": True} for q in KNOWN]
    return EvaluationSection.model_validate({"facts": facts, "min_facts": min_facts})


def evaluation(
    base: str = "paris?", merged: str = "a? b? paris?", losses: tuple[float, float] = (3.0, 1.0)
) -> Evaluation:
    """``base`` and ``merged``: the questions that each answers."""
    said = {"base": base.split(), "merged": merged.split()}
    facts = [
        FactAnswer(subject=subject, question=q, expected="x", answer="x", found=q in answered)
        for subject, answered in said.items()
        for q in (*NEW, *KNOWN)
    ]
    subjects = [
        SubjectResult(subject=name, nats_per_token=loss, seconds=1.0) for name, loss in zip(said, losses, strict=True)
    ]
    empty: dict[str, Any] = {name: [] for name in ("comparisons", "documents", "answers")}
    numbers = {"num_documents": 1, "num_tokens": 1, "num_bytes": 1}
    names = {"base_sha256": "", "adapter_sha256": "", "device": "cpu", "dtype": "float32"}
    return Evaluation.model_validate({**empty, **numbers, **names, "subjects": subjects, "facts": facts})


def gguf(answered: str = "a? b? paris?") -> list[dict[str, Any]]:
    return [{"model": "m.gguf", "question": q, "found": q in answered.split()} for q in (*NEW, *KNOWN)]


def test_a_run_that_learnt_and_kept_everything_has_no_fault() -> None:
    assert find_faults(wanted(), evaluation(), gguf()) == []
    assert find_faults(wanted(1), evaluation(merged="b? paris?"), gguf("a? paris?")) == []


@pytest.mark.parametrize(
    ("change", "said", "fault"),
    [
        ({"base": "a? paris?"}, "a? b? paris?", "the base knew it before training: a?"),
        ({"base": ""}, "a? b? paris?", "the base does not know it: paris?"),
        ({}, "a? paris?", "m.gguf answers 1 of 2 facts, and 2 are wanted"),
        ({"merged": "paris?"}, "a? b? paris?", "merged answers 0 of 2 facts, and 2 are wanted"),
        ({}, "a? b?", "m.gguf has forgotten it: paris?"),
        ({"losses": (3.0, 3.0)}, "a? b? paris?", "held-out loss did not fall: 3.0000 -> 3.0000 nats per token"),
        ({"losses": (3.0, 3.5)}, "a? b? paris?", "held-out loss did not fall: 3.0000 -> 3.5000 nats per token"),
    ],
)
def test_each_fault_is_named(change: dict[str, Any], said: str, fault: str) -> None:
    assert find_faults(wanted(), evaluation(**change), gguf(said)) == [fault]


def test_a_known_thing_does_not_stand_in_for_a_fact() -> None:
    faults = find_faults(wanted(1), evaluation(), gguf("paris?"))
    assert faults == ["m.gguf answers 0 of 2 facts, and 1 are wanted"]


def test_faults_are_exit_code_8() -> None:
    with pytest.raises(CheckError, match="FAIL: it is wrong"):
        Outcome("run", faults=["it is wrong"], verdict="FAIL: it is wrong").require_success()
    Outcome("run", verdict="PASS").require_success()


@pytest.mark.parametrize(
    ("text", "answer", "holds"),
    [
        ("It is KESTREL-9263.", "kestrel-9263", True),
        ("It is Ottoline\n  Brask!", "Ottoline Brask", True),
        ("H2O", "H2O", True),
        ("417 steps", "417", True),
        ("There are 1417 steps.", "417", False),
        ("There are 4170 steps.", "417", False),
        ("It is KESTREL-92634.", "KESTREL-9263", False),
        ("Parisian", "Paris", False),
        ("Ottoline and Brask", "Ottoline Brask", False),
        ("", "Paris", False),
    ],
)
def test_an_answer_is_found_as_whole_words(text: str, answer: str, holds: bool) -> None:
    assert holds_answer(text, answer) is holds
