"""Where a run stands, from its files, and the command that goes on from there."""

from __future__ import annotations

import json
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest

from forge.training.cli import app
from forge.training.train.progress import describe_status, next_command
from forge.training.train.step_log import read_step_log
from tests.support import run_command as command
from tests.support.run_pages import HELD_OUT, QUESTION, logged, whole_run
from tests.support.terminal import on_terminal
from tests.support.tiny_run import NUM_STEPS, adapter, arguments, edit_json, made_up_run

STATUS = {
    **{"state": "completed", "step": 60, "num_planned_steps": 60, "process": 1, "host": "h"},
    **{"started_at": "2026-11-24T12:00:00+00:00", "updated_at": "2026-11-24T12:00:00+00:00"},
}


def with_status(run_dir: Path, **changes: Any) -> Path:
    (run_dir / "status.json").write_text(json.dumps(STATUS | changes), encoding="utf-8")
    return run_dir


def test_a_complete_run_says_its_losses_its_best_step_and_what_is_next(tmp_path: Path) -> None:
    run_dir = with_status(whole_run(tmp_path / "a run"))
    status = describe_status(run_dir)
    assert status["loss"] == pytest.approx(2.05)
    assert (status["validation_loss"], status["best_step"], status["best_validation_loss"]) == (
        HELD_OUT[2][1],
        40,
        2.75,
    )
    assert status["tokens_per_second"] == pytest.approx(800)
    assert status["seconds_left"] is None
    assert status["run_dir"] == str(run_dir)
    assert status["next"] == ["forge", "chat", str(run_dir), QUESTION]


def test_a_run_that_stopped_has_time_left_and_one_that_measured_nothing_has_no_figures(tmp_path: Path) -> None:
    run_dir = with_status(tmp_path, state="interrupted", step=30)
    status = describe_status(run_dir)
    figures = ("loss", "validation_loss", "best_step", "best_validation_loss", "tokens_per_second", "seconds_left")
    assert [status[name] for name in figures] == [None] * 6
    assert status["next"] is None
    text = "".join(json.dumps(row) + "\n" for row in logged()[:30])
    (run_dir / "steps.jsonl").write_text(text + '{"step": 31, "loss"', encoding="utf-8")
    assert describe_status(run_dir)["seconds_left"] == pytest.approx(15.0)  # 30 steps of half a second


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1, "loss": NaN, "seconds": 1, "tokens": 1}',
        '{"step": 1, "loss": "1.5"}',
        '{"step": true, "answer": 1, "question": null}',
        '{"loss": 1.0}',
        "[1]",
        "[" * 5000,
        '{"step": 1, "loss": 1.0, "seconds": 0, "tokens": 5}',
    ],
)
def test_a_line_of_any_shape_is_no_error(tmp_path: Path, line: str) -> None:
    (tmp_path / "steps.jsonl").write_text(f"{line}\n", encoding="utf-8")
    log = read_step_log(tmp_path)
    assert (log.validation, log.samples, log.tokens_per_second) == ([], [], None)


def test_each_step_of_the_way_leads_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir = made_up_run(tmp_path / "run")  # three examples were held out
    assert next_command(run_dir) == ["forge", "evaluate", "run"]
    (run_dir / "evaluation.json").write_text("{}", encoding="utf-8")
    assert next_command(run_dir) == ["forge", "export", "run"]
    for folder in (tmp_path / "elsewhere", run_dir / "export"):
        folder.mkdir()
        (folder / "export.json").write_text('{"modelfile_uses": "x.gguf"}', encoding="utf-8")
    assert next_command(run_dir, tmp_path / "elsewhere") == ["forge", "chat", "elsewhere"]
    assert next_command(run_dir) == ["forge", "chat", "run"]


def test_a_run_that_nothing_can_be_evaluated_of_is_exported(tmp_path: Path) -> None:
    run_dir = made_up_run(tmp_path / "run")
    inputs = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))["inputs"]
    edit_json(run_dir / "run.json", inputs=inputs | {"num_validation_examples": 0})
    assert next_command(run_dir) == ["forge", "export", str(run_dir)]


def test_the_next_command_of_an_interrupted_run_resumes_it_to_the_same_bits(
    folder: Path, reference: dict[str, Any]
) -> None:
    out = folder / "stopped here"
    plan = ("--plan", "micro_batch=2")
    stop = {"STOP_MOMENT": "evaluation", "STOP_SIGNAL": str(int(signal.SIGINT))}
    typed_first, planted = arguments(folder, out, *plan), "tests.support.faults:ask_to_stop"
    stopped = command.run(typed_first, folder / "logs" / "stopped", fault=planted, environment=stop)
    assert stopped.returncode == 130, stopped.stderr
    asked = command.run(["status", out], folder / "logs" / "asked")
    line = next(line for line in asked.stdout.splitlines() if line.startswith("next: "))
    typed = shlex.split(line)[1:]
    assert typed[:2] == ["forge", "train"]
    assert (out / "workload.plans.yaml").is_file()  # the plan that it was started with
    done = command.run(typed[1:], folder / "logs" / "resumed")
    assert done.returncode == 0, done.stderr
    whole = folder / "two-by-two"
    assert command.run(arguments(folder, whole, *plan), folder / "logs" / "two").returncode == 0
    assert adapter(out) == adapter(whole)
    assert f"next: forge evaluate {shlex.quote(str(out))}" in done.stdout
    assert f"run directory: {out}" in done.stdout
    assert (out / "report.html").is_file()
    after = describe_status(out)
    assert (after["state"], after["step"], after["next"][1]) == ("completed", NUM_STEPS, "evaluate")


@pytest.mark.parametrize("columns", [60, 100])
def test_status_and_check_fit_a_terminal_of_that_width(columns: int, tmp_path: Path) -> None:
    """Every line is broken between words: what is longer is one word, a path or a part of a command."""
    run_dir = with_status(whole_run(tmp_path / ("long-name-of-a-run" * 4)))
    for arguments_, code in ((["status", run_dir], 0), (["check", "smoke"], None)):
        ended, text = on_terminal(["-m", "forge.training", *arguments_], columns=columns)
        assert code is None or ended == code, text
        lines = [line.replace("\x1b[0m", "") for line in text.splitlines()]
        for line in lines:
            plain = "".join(part.partition("m")[2] if i else part for i, part in enumerate(line.split("\x1b[")))
            assert len(plain) <= columns or max(map(len, plain.split())) > columns - 30, plain
        assert "…" not in text
    assert os.fspath(run_dir) in on_terminal(["-m", "forge.training", "status", run_dir], columns=columns)[1]


def test_the_command_of_the_page_is_a_command() -> None:
    import typer

    assert "report" in typer.main.get_command(app).commands  # type: ignore[attr-defined]
