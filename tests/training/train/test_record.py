"""Run records: what was written comes back, and what is none is refused with every reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forge.training.config.workload import Workload
from forge.training.system.errors import DataError
from forge.training.system.files import locked
from forge.training.train.record import RunRecord, completed_record, read_record
from forge.training.train.status import StatusFile

DIGEST = "a" * 64
INPUTS = {
    "base_sha256": DIGEST,
    "tokenizer_sha256": DIGEST,
    "train_examples_sha256": DIGEST,
    "num_train_examples": 3,
    "num_validation_examples": 0,
    "num_train_tokens": 30,
    "num_trained_tokens": 20,
}


@pytest.fixture
def content() -> dict[str, Any]:
    workload = Workload.model_validate({"name": "w", "data": {"documents": "embedded"}})
    record = RunRecord.model_validate(
        {
            "status": "completed",
            "backend": "trl",
            "workload": workload.model_dump(mode="json"),
            "workload_sha256": workload.digest(),
            "plan": {},
            "seed": 1,
            "base_path": "base",
            "started_at": "2026-11-23T12:00:00+00:00",
            "num_steps": 3,
            "num_planned_steps": 3,
            "inputs": INPUTS,
        }
    )
    return record.model_dump(mode="json")


def put(folder: Path, content: Any) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "run.json").write_text(text, encoding="utf-8")
    return folder


def test_what_was_written_comes_back(tmp_path: Path, content: dict[str, Any]) -> None:
    record = RunRecord.model_validate(content)
    record.write(tmp_path)
    assert completed_record(tmp_path) == record


def change(*path: str, to: Any) -> Callable[[dict[str, Any]], Any]:
    def applied(content: dict[str, Any]) -> dict[str, Any]:
        holder = content
        for part in path[:-1]:
            holder = holder[part]
        holder[path[-1]] = to
        return content

    return applied


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no JSON": (lambda _: "{", "not readable JSON"),
    "no object": (lambda _: "[]", "expected a JSON object, found list"),
    "deep": (lambda _: '{"a":' * 100_000, "not readable JSON"),
    "a not-a-number": (change("losses", "last_train_loss", to=float("nan")), "NaN is"),
    "an infinity": (change("timing", "train_seconds", to=float("inf")), "Infinity is"),
    "a number as text": (change("num_steps", to="3"), "num_steps: Input should be a valid integer (given: '3')"),
    "a loss as text": (change("losses", "last_train_loss", to="nan"), "losses.last_train_loss: Input should be"),
    "a key too many": (change("stauts", to=1), "stauts: unknown key; did you mean status?"),
    "a key too many inside": (change("inputs", "base_sha255", to=1), "unknown key; did you mean base_sha256?"),
    "an unknown status": (change("status", to="done"), "status: Input should be 'running', 'completed'"),
    "another schema": (change("schema_version", to=2), "is a run record of schema 2, and this Forge reads schema 1"),
    "a strange schema": (change("schema_version", to=[1]), "is a run record of schema [1]"),
    "a strange environment": (change("environment", "packages", to=[1]), "environment.packages is no object"),
    "a workload that is none": (change("workload", to={}), "workload.name: required, and not given"),
    "a workload of a later day": (change("workload", "lora", "magic", to=1), "workload.lora.magic: unknown key"),
    "an interrupted run": (change("status", to="interrupted"), "is interrupted at step 3 of 3"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_record_of_a_completed_run_is_refused(tmp_path: Path, content: dict[str, Any], fault: str) -> None:
    spoil, message = FAULTS[fault]
    with pytest.raises(DataError) as caught:
        completed_record(put(tmp_path, spoil(content)))
    assert message in caught.value.message


def test_every_fault_of_a_record_is_named(tmp_path: Path, content: dict[str, Any]) -> None:
    del content["seed"], content["inputs"]["base_sha256"]
    content["num_steps"] = None
    with pytest.raises(DataError) as caught:
        read_record(put(tmp_path, content))
    assert caught.value.message.count("\n") == 3


def test_a_record_larger_than_any_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "run.json", "wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(DataError, match="larger than"):
        read_record(tmp_path)


@pytest.mark.parametrize("name", ["absent", "x" * 5000, "a\0b"])
def test_a_directory_that_is_no_run_says_so(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="is not a run"):
        read_record(tmp_path / name)


def test_a_running_run_is_refused_with_its_real_step_and_what_to_do(tmp_path: Path, content: dict[str, Any]) -> None:
    """The record is written when a run begins, the status while it works; the lock says whether anybody does."""
    put(tmp_path, content | {"status": "running", "num_steps": 0, "num_planned_steps": 30})
    status = StatusFile(tmp_path)
    status.update(state="running", step=4, num_planned_steps=30)
    with locked(tmp_path), pytest.raises(DataError, match=r"is running at step 4 of 30, process \d+") as error:
        completed_record(tmp_path)
    assert "forge status" in str(error.value.remedy)
    with pytest.raises(DataError, match="is running at step 4 of 30; its process is gone") as error:
        completed_record(tmp_path)
    assert "shows the command that resumes it" in str(error.value.remedy)
    put(tmp_path, content | {"status": "diverged"})
    with pytest.raises(DataError, match="is diverged") as error:
        completed_record(tmp_path)
    assert "resumes" not in str(error.value.remedy)
