"""What `check` says of the chat template and the records: what training would say, by the same code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from forge.training.checks.check import Finding, check_workload
from forge.training.config.workload import Workload
from forge.training.data import inputs
from forge.training.system.errors import DataError
from tests.support.tiny_model import CHAT_TEMPLATE, shared_base
from tests.support.tiny_run import edit_json

ODD = "Before `</think>` it talks to itself."
SPLITS = CHAT_TEMPLATE.replace("message['content']", "message['content'].split('</think>')[-1]")


def write_corpus(path: Path, *answers: str) -> str:
    rows = [json.dumps({"instruction": "Recite", "output": answer}) for answer in answers]
    path.write_text("\n".join(rows), encoding="utf-8")
    return str(path)


def workload(folder: Path, base: Path, train: str | None = None, **data: Any) -> Workload:
    train = train or write_corpus(folder / "t.jsonl", "one", "two")
    data = {"train": train, "validation_share": 0, "max_length": 256, **data}
    return Workload.model_validate({"name": "w", "model": {"path": str(base)}, "data": data})


def said(findings: list[Finding], level: str) -> str:
    return "\n".join(f"{f.subject}: {f.message} -> {f.remedy}" for f in findings if f.level == level)


@pytest.fixture
def own_base(tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared_base(), tmp_path / "base"))


def test_what_the_chat_template_cannot_hold_is_found_with_the_code_that_trains(own_base: Path, tmp_path: Path) -> None:
    (own_base / "chat_template.jinja").write_text(SPLITS, encoding="utf-8")
    odd = write_corpus(tmp_path / "odd.jsonl", "one", ODD, "three", ODD)
    with pytest.raises(DataError) as raised:
        inputs.prepare_inputs(workload(tmp_path, own_base, odd), own_base, tmp_path / "run")
    findings = check_workload(workload(tmp_path, own_base, odd), "trl", tmp_path)
    (found,) = (f for f in findings if f.subject == "examples" and f.level == "error")
    assert (found.message, found.remedy, found.exit_code) == (raised.value.message, raised.value.remedy, 3)
    assert "line 2: " in found.message
    assert "line 4: " in found.message
    work = workload(tmp_path, own_base, odd, on_unrepresentable="leave_out")
    findings = check_workload(work, "trl", tmp_path)
    assert "2 of 4 records left out" in said(findings, "warning")
    assert "training: 2 of" in said(findings, "ok")


@pytest.mark.parametrize(
    ("template", "level", "fault"),
    [
        ("{% for %}", "error", "refuses the conversation"),
        (CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think>\n"), "error", r"assistant\n<think>\n', and renders"),
        (CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think></think>"), "warning", "<think></think>"),
        ("{{ strftime_now('%Y') }}" + CHAT_TEMPLATE, "warning", "writes the date"),
    ],
    ids=["broken", "asks otherwise", "thinks", "dated"],
)
def test_what_a_chat_template_does_to_training_is_said(
    own_base: Path, tmp_path: Path, template: str, level: str, fault: str
) -> None:
    (own_base / "chat_template.jinja").write_text(template, encoding="utf-8")
    findings = check_workload(workload(tmp_path, own_base), "trl", tmp_path)
    assert fault in said([finding for finding in findings if finding.subject == "chat template"], level)


def test_several_templates_without_a_default_are_found(own_base: Path, tmp_path: Path) -> None:
    (own_base / "chat_template.jinja").unlink()
    edit_json(own_base / "tokenizer_config.json", chat_template=[{"name": "rag", "template": CHAT_TEMPLATE}])
    found = check_workload(workload(tmp_path, own_base), "trl", tmp_path)
    assert "none is named default (it has: rag)" in said(found, "error")
    edit_json(own_base / "tokenizer_config.json", chat_template=[{"name": "default", "template": CHAT_TEMPLATE}])
    assert "chat template" not in said(check_workload(workload(tmp_path, own_base), "trl", tmp_path), "error")


def test_documents_that_cannot_be_read_are_one_error_and_not_two(tmp_path: Path) -> None:
    work = workload(tmp_path, shared_base(), str(tmp_path / "absent.jsonl"))
    findings = check_workload(work, "trl", tmp_path)
    assert said(findings, "error").count("absent.jsonl") == 1
