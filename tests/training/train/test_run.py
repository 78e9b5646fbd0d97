"""Training through the real command, on a CPU, with a real tiny model."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from forge.training.backends import load_plan
from forge.training.config.workload import load_workload
from tests.support import run_command as command
from tests.support.run_command import Ended, Running
from tests.support.tiny_run import NUM_STEPS, adapter, arguments, lines, record, status


def start(folder: Path, out: str, *more: str) -> Running:
    return command.start(arguments(folder, folder / out, *more), folder / "logs" / out)


def run(folder: Path, out: str, *more: str) -> Ended:
    return start(folder, out, *more).wait()


def test_a_run_leaves_a_record_an_adapter_and_a_line_a_step(folder: Path, reference: dict[str, Any]) -> None:
    assert reference["status"] == "completed"
    assert reference["num_steps"] == NUM_STEPS
    assert reference["losses"]["last_train_loss"] < reference["losses"]["first_train_loss"]
    assert reference["losses"]["best_validation_loss"] <= reference["losses"]["first_validation_loss"]
    steps = [line for line in lines(folder / "reference") if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, NUM_STEPS + 1))
    assert all(line["documents"] == 4 and line["tokens"] > line["trained_tokens"] > 0 for line in steps)
    assert record(folder / "reference") == reference
    ended = status(folder / "reference")
    assert (ended["state"], ended["step"], ended["exit_code"]) == ("completed", NUM_STEPS, 0)


def test_the_layout_of_a_step_does_not_change_its_labels_or_its_loss(folder: Path, reference: dict[str, Any]) -> None:
    same = ("--set", "lora.dropout=0", "--set", "training.max_steps=6", "--json")
    records = [
        json.loads(run(folder, f"layout-{plan}", *same, "--plan", f"micro_batch={plan}").stdout) for plan in (1, 2, 4)
    ]
    assert records[0]["batch_digests"] == records[1]["batch_digests"] == records[2]["batch_digests"]
    losses = [[line["loss"] for line in lines(folder / f"layout-{plan}") if "loss" in line] for plan in (1, 2, 4)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)


def test_the_rehearsal_changes_no_bit_of_the_run(folder: Path, reference: dict[str, Any]) -> None:
    assert run(folder, "unrehearsed", "--plan", "rehearsal=false").returncode == 0
    assert adapter(folder / "unrehearsed") == adapter(folder / "reference")
    assert lines(folder / "unrehearsed")[0]["loss"] == lines(folder / "reference")[0]["loss"]
    assert reference["timing"]["rehearsal_seconds"] > 0


def test_the_command_of_a_complete_run_changes_nothing(folder: Path, reference: dict[str, Any]) -> None:
    before = {path: path.read_bytes() for path in (folder / "reference").rglob("*") if path.is_file()}
    for more in ((), ("--resume",)):
        done = run(folder, "reference", *more, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == reference
        assert "nothing to do" in done.stderr
    after = {path: path.read_bytes() for path in (folder / "reference").rglob("*") if path.is_file()}
    lock = folder / "reference" / ".lock"
    del before[lock], after[lock]
    assert after == before


def test_a_runs_own_config_keeps_the_plan_that_it_ran_with(folder: Path, reference: dict[str, Any]) -> None:
    assert "plan: smoke.plans.yaml" in run(folder, "planned", "--set", "training.max_steps=2").stderr
    done = run(folder, "planned", "--set", "training.max_steps=2", "--force", "--plan", "micro_batch=2")
    assert "smoke.plans.yaml, with --plan micro_batch=2" in done.stderr
    plan = record(folder / "planned")["plan"]
    assert plan != reference["plan"]
    own = load_workload(folder / "planned" / "workload.yaml", ["name=other"])
    assert load_plan(own, "trl").model_dump() == plan
    assert load_plan(own, "unsloth") == load_plan(load_workload("smoke"), "unsloth")


def test_a_run_of_other_settings_is_refused_and_kept(folder: Path, reference: dict[str, Any]) -> None:
    before = adapter(folder / "reference"), (folder / "reference" / "workload.yaml").read_bytes()
    for more in ((), ("--resume",)):
        done = run(folder, "reference", "--set", "lora.alpha=99", *more)
        assert done.returncode == 2
        assert "lora.alpha: 64 -> 99" in done.stderr
    assert (adapter(folder / "reference"), (folder / "reference" / "workload.yaml").read_bytes()) == before


def test_files_that_no_run_wrote_are_not_replaced(folder: Path) -> None:
    kept = folder / "strangers" / "adapter" / "precious"
    kept.parent.mkdir(parents=True)
    kept.write_text("not a run's")
    done = run(folder, "strangers")
    assert done.returncode == 6
    assert "exists already" in done.stderr
    assert kept.read_text() == "not a run's"


def stop(folder: Path, out: str, number: int, after_steps: int) -> int:
    running = start(folder, out)
    log = folder / out / "steps.jsonl"
    assert running.wait_for(lambda: log.is_file() and log.read_text().count('"loss"') >= after_steps)
    running.send_signal(number)
    return running.wait().returncode


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_an_interrupted_run_resumes_to_the_same_bits(
    folder: Path, reference: dict[str, Any], number: int, code: int
) -> None:
    out = f"stopped-{number}"
    assert stop(folder, out, number, after_steps=7) == code
    state = "running" if number == signal.SIGKILL else "interrupted"
    assert record(folder / out)["status"] == status(folder / out)["state"] == state
    assert not (folder / out / "adapter").exists()
    done = run(folder, out, "--json")
    assert done.returncode == 0, done.stderr
    assert adapter(folder / out) == adapter(folder / "reference")
    resumed = json.loads(done.stdout)
    assert resumed["num_steps"] == NUM_STEPS
    assert resumed["losses"] == pytest.approx(reference["losses"])
    assert resumed["batch_digests"] == reference["batch_digests"]
    assert [(r["step"] >= 5, r["after"]) for r in resumed["resumes"]] == [(True, state)]


def test_a_run_whose_held_out_loss_no_longer_falls_ends_early_with_its_best_adapter(folder: Path) -> None:
    settings = (
        "optimizer.learning_rate=1",
        "optimizer.schedule=constant",
        "training.evaluate_every_steps=2",
        "training.early_stopping_patience=2",
    )
    more = [part for setting in settings for part in ("--set", setting)]
    done = run(folder, "impatient", *more)
    assert done.returncode == 0, done.stderr
    ended = record(folder / "impatient")
    assert ended["num_steps"] == ended["losses"]["best_step"] + 2 * 2 < NUM_STEPS
    assert status(folder / "impatient")["state"] == "completed"
    assert (
        json.loads((folder / "impatient" / "adapter" / "best.json").read_text())["step"] == ended["losses"]["best_step"]
    )


def test_a_second_run_in_one_directory_is_refused(folder: Path) -> None:
    first = start(folder, "busy")
    try:
        assert first.wait_for(lambda: (folder / "busy" / "workload.yaml").is_file())
        second = command.run(arguments(folder, folder / "busy"), folder / "logs" / "second")
        assert second.returncode == 9
        assert str(first.pid) in second.stderr
        asked = command.run(["status", str(folder / "busy"), "--json"], folder / "logs" / "asked")
        assert str(first.pid) in json.loads(asked.stdout)["holder"]
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    asked = command.run(["status", str(folder / "busy")], folder / "logs" / "asked")
    assert asked.stdout.startswith("killed at")


def test_a_learning_rate_that_explodes_ends_as_diverged_with_finite_weights(folder: Path) -> None:
    done = run(folder, "diverged", "--set", "optimizer.learning_rate=1e30", "--set", "optimizer.warmup_ratio=0")
    assert done.returncode == 7, done.stderr
    assert "step" in done.stderr
    assert record(folder / "diverged")["status"] == "diverged"
    assert status(folder / "diverged")["exit_code"] == 7
    assert not (folder / "diverged" / "adapter").exists()


def test_a_read_only_output_is_refused_before_anything_is_done(folder: Path) -> None:
    (folder / "file").write_text("in the way")
    started = time.monotonic()
    done = run(folder, "file/run")
    assert done.returncode == 6
    assert (folder / "file").read_text() == "in the way"
    assert time.monotonic() - started < 60
