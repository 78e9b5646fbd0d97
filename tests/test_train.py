"""Training through the real command, on a CPU, with a real tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from .tiny_model import write_base

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    write_base(folder / "base", tied=False)
    rows = [
        {"instruction": f"Recite `{i}.md`", "input": "", "output": f"# {i}\n" + "It counts ships. " * (1 + i % 7)}
        for i in range(24)
    ]
    for name, part in (("train", rows[:20]), ("validation", rows[20:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part), encoding="utf-8")
    return folder


def command(folder: Path, out: str, *more: str) -> list[str]:
    settings = {
        "model.path": folder / "base",
        "data.train": folder / "train.jsonl",
        "data.validation": folder / "validation.jsonl",
        "data.max_length": 128,
        "lora.rank": 4,
        "lora.dropout": 0.1,
        "training.max_steps": 24,
        "training.evaluate_every_steps": 8,
        "training.save_every_steps": 5,
        "report_to": "[]",
    }
    arguments = [a for key, value in settings.items() for a in ("--set", f"{key}={value}")]
    return [
        *(sys.executable, "-m", "forge.training", "train", "smoke", "--backend", "trl"),
        *arguments,
        *("-o", str(folder / out)),
        *more,
    ]


def run(folder: Path, out: str, *more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command(folder, out, *more), capture_output=True, text=True, env=environment, timeout=180, check=False
    )


def lines(folder: Path, out: str) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / out / "steps.jsonl").read_text().splitlines()]


def adapter(folder: Path, out: str) -> bytes:
    return (folder / out / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[str, Any]:
    done = run(folder, "reference", "--json")
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def test_a_run_leaves_a_record_an_adapter_and_a_line_a_step(folder: Path, reference: dict[str, Any]) -> None:
    assert reference["status"] == "completed"
    assert reference["num_steps"] == 24
    assert reference["losses"]["last_train_loss"] < reference["losses"]["first_train_loss"]
    assert reference["losses"]["best_validation_loss"] <= reference["losses"]["first_validation_loss"]
    steps = [line for line in lines(folder, "reference") if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 25))
    assert all(line["documents"] == 4 and line["tokens"] > line["trained_tokens"] > 0 for line in steps)
    assert json.loads((folder / "reference" / "run.json").read_text()) == reference


def test_the_layout_of_a_step_does_not_change_its_labels_or_its_loss(folder: Path, reference: dict[str, Any]) -> None:
    same = ("--set", "lora.dropout=0", "--set", "training.max_steps=6", "--json")
    records = [
        json.loads(run(folder, f"layout-{plan}", *same, "--plan", f"micro_batch={plan}", "--force").stdout)
        for plan in (1, 2, 4)
    ]
    assert records[0]["batch_digests"] == records[1]["batch_digests"] == records[2]["batch_digests"]
    losses = [[line["loss"] for line in lines(folder, f"layout-{plan}") if "loss" in line] for plan in (1, 2, 4)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)


def test_the_rehearsal_changes_no_bit_of_the_run(folder: Path, reference: dict[str, Any]) -> None:
    assert run(folder, "unrehearsed", "--plan", "rehearsal=false").returncode == 0
    assert adapter(folder, "unrehearsed") == adapter(folder, "reference")
    assert lines(folder, "unrehearsed")[0]["loss"] == lines(folder, "reference")[0]["loss"]
    assert reference["timing"]["rehearsal_seconds"] > 0


def test_an_existing_run_is_refused_unless_forced(folder: Path, reference: dict[str, Any]) -> None:
    before = adapter(folder, "reference")
    done = run(folder, "reference")
    assert done.returncode == 6
    assert "exists already" in done.stderr
    assert adapter(folder, "reference") == before


def stop(folder: Path, out: str, number: int, after_steps: int) -> int:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command(folder, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    log, deadline = folder / out / "steps.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if log.is_file() and log.read_text().count('"loss"') >= after_steps:
            break
        time.sleep(0.002)
    process.send_signal(number)
    return process.wait(timeout=60)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_an_interrupted_run_resumes_to_the_same_bits(
    folder: Path, reference: dict[str, Any], number: int, code: int
) -> None:
    out = f"stopped-{number}"
    assert stop(folder, out, number, after_steps=7) == code
    interrupted = json.loads((folder / out / "run.json").read_text())
    assert interrupted["status"] == ("running" if number == signal.SIGKILL else "interrupted")
    assert not (folder / out / "adapter").exists()
    done = run(folder, out, "--resume", "--json")
    assert done.returncode == 0, done.stderr
    assert adapter(folder, out) == adapter(folder, "reference")
    resumed = json.loads(done.stdout)
    assert resumed["num_steps"] == 24
    assert resumed["losses"] == pytest.approx(reference["losses"])
    assert resumed["batch_digests"] == reference["batch_digests"]


def test_resuming_other_work_is_refused_with_what_changed(folder: Path, reference: dict[str, Any]) -> None:
    assert stop(folder, "other", signal.SIGTERM, after_steps=7) == 143
    before = (folder / "other" / "workload.yaml").read_bytes()
    done = run(folder, "other", "--resume", "--set", "lora.alpha=99")
    assert done.returncode == 3
    assert "belongs to other work" in done.stderr
    assert "lora.alpha: 64 -> 99" in done.stderr
    assert (folder / "other" / "workload.yaml").read_bytes() == before


def test_resuming_a_complete_run_changes_nothing(folder: Path, reference: dict[str, Any]) -> None:
    before = adapter(folder, "reference")
    done = run(folder, "reference", "--resume", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == reference
    assert adapter(folder, "reference") == before


def test_a_second_run_in_one_directory_is_refused(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(
        command(folder, "busy"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    try:
        while not (folder / "busy" / "workload.yaml").is_file() and first.poll() is None:
            time.sleep(0.01)
        second = run(folder, "busy")
        assert second.returncode == 9
        assert str(first.pid) in second.stderr
    finally:
        first.kill()
        first.wait()


def test_a_learning_rate_that_explodes_ends_as_diverged_with_finite_weights(folder: Path) -> None:
    done = run(folder, "diverged", "--set", "optimizer.learning_rate=1e30", "--set", "optimizer.warmup_ratio=0")
    assert done.returncode == 7, done.stderr
    assert "step" in done.stderr
    assert json.loads((folder / "diverged" / "run.json").read_text())["status"] == "diverged"
    assert not (folder / "diverged" / "adapter").exists()


def test_a_read_only_output_is_refused_before_anything_is_done(folder: Path) -> None:
    (folder / "file").write_text("in the way")
    done = run(folder, "file/run")
    assert done.returncode == 6
    assert (folder / "file").read_text() == "in the way"
