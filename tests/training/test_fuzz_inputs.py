"""Inputs nobody would write: each ends in what it means or in one documented error, soon, and never in a traceback.

Every kind of input is tried a few times in a plain run and some hundred times in ``make test-slow``;
:mod:`tests.training.test_fuzz_artefacts` does the same for adapters and GGUF files.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from forge.training.backends import BACKENDS, load_plan
from forge.training.checks.check import check_workload
from forge.training.config.find import WORKLOADS
from forge.training.config.plan import Plan
from forge.training.config.workload import Workload, load_workload
from forge.training.data.batching import num_steps, step_order
from forge.training.data.conversation import Encoder
from forge.training.data.examples import encode_records
from forge.training.data.records import read_both
from forge.training.evaluation.evaluate import evaluate_run
from forge.training.evaluation.record import Evaluation
from forge.training.export.card import ExportRecord, read_evaluation, write_card
from forge.training.export.chat import settings_of
from forge.training.export.export import export_run
from forge.training.export.folder import ExportFolder
from forge.training.export.shipped import find_shipped
from forge.training.system.environment import ROOT
from forge.training.system.errors import ConfigurationError, DataError
from forge.training.train.progress import describe_status
from forge.training.train.record import completed_record
from forge.training.train.resume import previous_run
from tests.support.fuzzing import (
    FRAGMENTS,
    JSON_SPOILS,
    STRANGE_TEXTS,
    attempt,
    fuzz,
    json_bytes,
    mutated,
    spliced,
    survives,
)
from tests.support.tiny_model import shared_adapter, shared_base, write_tokenizer
from tests.support.tiny_run import write_run

# How many inputs of each kind: in a plain run, in `make test-slow`.
EFFORT = {
    "workload": (25, 400),
    "workload bytes": (10, 200),
    "plan": (25, 300),
    "records": (25, 400),
    "run record": (30, 400),
    "evaluation": (25, 250),
    "export": (40, 600),
    "status": (15, 150),
    "base": (5, 250),
}

SHIPPED = [
    yaml.safe_load(p.read_text(encoding="utf-8")) for p in sorted(WORKLOADS.glob("*.yaml")) if p.name.count(".") == 1
]
OVERRIDES = st.lists(
    st.tuples(
        st.sampled_from(
            ["lora.rank", "training.epochs", "data", "data.train", "a.b.c", "model.path", "", ".", "x" * 200]
        )
        | st.text(max_size=10),
        st.sampled_from(["=", "=", "=", ""]),
        st.sampled_from([*STRANGE_TEXTS, *FRAGMENTS]) | st.text(max_size=20),
    ).map("".join),
    max_size=3,
)


@fuzz(*EFFORT["workload"])
def test_any_config_is_read_or_refused(effort: int, tmp_path: Path) -> None:
    texts = spliced(st.sampled_from(SHIPPED).flatmap(mutated).map(lambda content: yaml.safe_dump(content)))

    def body(given_input: tuple[str, list[str]]) -> None:
        text, overrides = given_input
        path = tmp_path / "w.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        workload = survives(lambda: load_workload(path, overrides))
        if workload is None:
            return
        assert len(workload.digest()) == 64
        path.write_text(workload.to_yaml(), encoding="utf-8")
        assert load_workload(path) == workload
        survives(lambda: step_order(workload, 3) if num_steps(workload, 3) < 10_000 else None)

    attempt(effort, st.tuples(texts, OVERRIDES), body)


@fuzz(*EFFORT["workload bytes"])
def test_bytes_that_are_not_a_config_are_refused(effort: int, tmp_path: Path) -> None:
    def body(content: bytes) -> None:
        (tmp_path / "w.yaml").write_bytes(content)
        assert survives(lambda: load_workload(tmp_path / "w.yaml")) is None

    attempt(
        effort, st.binary(max_size=400) | spliced(st.just("a: 1\n")).map(lambda t: t.encode("utf-8", "ignore")), body
    )


PLANS = [yaml.safe_load(p.read_text(encoding="utf-8")) for p in sorted(WORKLOADS.glob("*.plans.yaml"))]
PLAN_OVERRIDES = st.lists(
    st.tuples(
        st.sampled_from([*Plan.model_fields, "micro_bach", "", "a.b"]),
        st.sampled_from(["=", "=", "=", ""]),
        st.sampled_from([*STRANGE_TEXTS, "1", "2", "3", "null", "tokens", "full", "true"]) | st.text(max_size=20),
    ).map("".join),
    max_size=3,
)


@fuzz(*EFFORT["plan"])
def test_any_plan_is_read_or_refused(effort: int, tmp_path: Path) -> None:
    workload = load_workload(shutil.copy(WORKLOADS / "smoke.yaml", tmp_path))
    texts = spliced(st.sampled_from(PLANS).flatmap(mutated).map(lambda content: yaml.safe_dump(content)))

    def body(given_input: tuple[str, str, list[str]]) -> None:
        text, backend, overrides = given_input
        (tmp_path / "smoke.plans.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
        plan = survives(lambda: load_plan(workload, backend, overrides))  # type: ignore[arg-type]
        assert plan is None or workload.training.effective_batch % plan.micro_batch == 0

    attempt(effort, st.tuples(texts, st.sampled_from(BACKENDS), PLAN_OVERRIDES), body)


GOOD_ROWS: list[dict[str, Any]] = [
    {"instruction": "Recite `a.md`", "input": "", "output": "It counts ships."},
    {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b <|im_end|> c"}]},
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ]
    },
]
LINES = (
    st.sampled_from(GOOD_ROWS).map(json.dumps)
    | st.sampled_from(GOOD_ROWS).flatmap(mutated).map(json.dumps)
    | spliced(st.sampled_from(GOOD_ROWS).map(json.dumps))
)


@fuzz(*EFFORT["records"])
def test_any_records_are_encoded_or_a_data_error(effort: int, tmp_path: Path) -> None:
    encoder = Encoder(write_tokenizer(tmp_path / "tokenizer"))

    def body(given_input: tuple[list[str], list[str], str, dict[str, Any]]) -> None:
        train, validation, end, changes = given_input
        for name, lines in (("train", train), ("validation", validation)):
            (tmp_path / name).write_bytes(end.join(lines).encode("utf-8", "surrogatepass"))
        both = survives(lambda: read_both(tmp_path / "train", tmp_path / "validation"))
        if both is None:
            return
        content = {"name": "w", "data": {"train": "t", "max_length": 128, **changes}}
        data = Workload.model_validate(content).data
        for side in both:
            assert side is not None
            examples = survives(lambda side=side: encode_records(side, encoder, data))
            if examples is not None:
                assert max(map(len, examples.input_ids)) <= 128
                assert all((labels[1:] != -100).any() for labels in examples.labels)

    changes = st.fixed_dictionaries(
        {},
        optional={
            "control_tokens": st.sampled_from(["neutralise", "drop", "fail"]),
            "long_documents": st.sampled_from(["divide", "cut"]),
            "loss_on": st.sampled_from(["answer", "all"]),
            "system_prompt": st.text(max_size=300),
        },
    )
    ends = st.sampled_from(["\n", "\n", "\r\n", "\n\n", "\r", "\u2028", ""])
    attempt(effort, st.tuples(st.lists(LINES, max_size=5), st.lists(LINES, max_size=3), ends, changes), body)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny model whose base is gone: judged by its records alone."""
    directory = tmp_path_factory.mktemp("fuzz") / "run"
    directory.mkdir()
    (directory / "adapter").symlink_to(shared_adapter())
    write_run(directory, shared_base())
    content = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    content["base_path"] = str(directory / "gone")
    (directory / "run.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


@fuzz(*EFFORT["run record"])
def test_any_run_record_is_read_or_a_data_error(effort: int, run_dir: Path) -> None:
    path = run_dir / "run.json"
    original = json.loads(path.read_text(encoding="utf-8"))
    smoke = load_workload("smoke")

    def body(content: bytes) -> None:
        path.write_bytes(content)
        survives(lambda: previous_run(run_dir, smoke, "trl", resume=False, force=False))
        assert survives(lambda: evaluate_run(run_dir)) is None  # its base is gone
        assert survives(lambda: export_run(run_dir, quantizations=["f16"])) is None
        run = survives(lambda: completed_record(run_dir))
        if run is not None:
            survives(lambda: write_card(run, export_record(), None, run_dir))

    try:
        attempt(effort, mutated(original).map(json_bytes) | JSON_SPOILS, body)
    finally:
        path.write_bytes(json_bytes(original))


def export_record() -> ExportRecord:
    digest = "a" * 64
    return ExportRecord("m", "o", digest, digest, digest, {}, [], None, "m-f16.gguf")


def measured_evaluation() -> dict[str, Any]:
    """A real one, cut to a few rows, of the adapter that :func:`export_record` names."""
    stored = ROOT / "tests" / "data" / "evaluation.json"
    content = json.loads(stored.read_text(encoding="utf-8")) | {"adapter_sha256": "a" * 64}
    return Evaluation.model_validate(content).model_dump(mode="json")


@fuzz(*EFFORT["evaluation"])
def test_any_evaluation_is_in_the_card_or_left_out_with_a_note(effort: int, run_dir: Path) -> None:
    path, run = run_dir / "evaluation.json", completed_record(run_dir)

    def body(content: bytes) -> None:
        path.write_bytes(content)
        export = export_record()
        evaluation = survives(lambda: read_evaluation(run_dir, export))
        survives(lambda: write_card(run, export, evaluation, run_dir))

    try:
        attempt(effort, mutated(measured_evaluation()).map(json_bytes) | JSON_SPOILS, body)
    finally:
        path.unlink()


@fuzz(*EFFORT["export"])
def test_any_export_folder_is_used_as_it_says_or_refused(effort: int, tmp_path: Path) -> None:
    """Its record and its Modelfile may come from elsewhere; the files that they name may be anywhere."""
    names = ["m.q8_0.gguf", "../m.gguf", "/etc/hostname", "Modelfile"]
    report = {"num_bytes": 1, "sha256": "a" * 64, "architecture": "qwen2", "file_type": "q8_0", "num_tensors": 1}
    report |= {"tensor_types": {}, "fallbacks": [], "pre_tokenizer": None, "num_vocabulary_tokens": 1}
    files = [report | {"has_chat_template": True, "name": name} for name in names]
    record = dataclasses.asdict(export_record()) | {"files": files, "max_length": 9, "parameters": {"top_k": 3}}
    modelfile = st.none() | st.text() | spliced(st.just("FROM ./m.q8_0.gguf\nSYSTEM s\nPARAMETER temperature 0.5\n"))
    (tmp_path / "m.q8_0.gguf").write_bytes(b"GGUF")

    def body(given_input: tuple[bytes, str | None]) -> None:
        content, text = given_input
        (tmp_path / "export.json").write_bytes(content)
        (tmp_path / "Modelfile").unlink(missing_ok=True)
        if text is not None:
            (tmp_path / "Modelfile").write_bytes(text.encode("utf-8", "surrogatepass"))
        folder = survives(lambda: ExportFolder.look(tmp_path))
        if folder is not None:
            assert all(Path(name).name == name for name in folder.own)
            survives(folder.stored)
        for given in (tmp_path, tmp_path / "m.q8_0.gguf"):
            survives(lambda given=given: settings_of(find_shipped(given)))  # type: ignore[misc]

    attempt(effort, st.tuples(mutated(record).map(json_bytes) | JSON_SPOILS, modelfile), body)


@fuzz(*EFFORT["status"])
def test_any_status_is_shown_or_a_data_error(effort: int, tmp_path: Path) -> None:
    status = {"schema_version": 1, "state": "running", "step": 3, "process": 7, "host": "h", "started_at": "t"}

    def body(content: bytes) -> None:
        (tmp_path / "status.json").write_bytes(content)
        survives(lambda: describe_status(tmp_path))

    attempt(effort, mutated(status | {"updated_at": "t"}).map(json_bytes) | JSON_SPOILS, body)


@fuzz(*EFFORT["base"])
def test_any_base_is_checked_to_the_end(effort: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two configuration files of a model directory from elsewhere, through ``check``: findings and no exception."""
    monkeypatch.setattr(
        "forge.training.checks.check.check_llama_cpp", lambda: iter(())
    )  # looks at no base, takes half a second
    base = tmp_path / "base"
    base.mkdir()
    for file in shared_base().iterdir():
        (base / file.name).symlink_to(file)
    (tmp_path / "train.jsonl").write_text(json.dumps(GOOD_ROWS[0]) + "\n", encoding="utf-8")
    content = {"name": "w", "model": {"path": str(base)}, "data": {"train": str(tmp_path / "train.jsonl")}}
    workload = Workload.model_validate(content)
    names = ["config.json", "tokenizer_config.json"]
    originals = {name: json.loads((base / name).read_text(encoding="utf-8")) for name in names}

    def body(spoilt: tuple[str, bytes]) -> None:
        name, raw = spoilt
        (base / name).unlink()
        (base / name).write_bytes(raw)
        findings = survives(lambda: check_workload(workload, "trl", tmp_path))
        assert findings
        assert all(finding.exit_code != 1 for finding in findings)
        (base / name).unlink()
        (base / name).write_bytes(json_bytes(originals[name]))

    spoilt = st.sampled_from(names).flatmap(
        lambda name: st.tuples(st.just(name), mutated(originals[name]).map(json_bytes) | JSON_SPOILS)
    )
    attempt(effort, spoilt, body)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["run.json", "evaluation.json", "status.json", "w.yaml", "train.jsonl"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / name)
    readers: dict[str, Callable[[], Any]] = {
        "run.json": lambda: completed_record(tmp_path),
        "evaluation.json": lambda: read_evaluation(tmp_path, export_record()),
        "status.json": lambda: describe_status(tmp_path),
        "w.yaml": lambda: load_workload("w.yaml"),
        "train.jsonl": lambda: read_both(tmp_path / "train.jsonl", None),
    }
    if name == "evaluation.json":
        assert readers[name]() is None
        return
    with pytest.raises((DataError, ConfigurationError), match=re.escape(name)):
        readers[name]()


def test_the_slow_tests_try_far_more_than_seven_hundred_inputs() -> None:
    assert sum(slow for _, slow in EFFORT.values()) > 2000
