"""Runs that are killed, stopped, starved of disk or memory: real processes, real signals, and the run that follows.

Each case trains to the same bits as a run that nothing happened to.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forge.training.train.checkpoint import SEAL, problem
from tests.support import run_command as command
from tests.support.run_command import Ended, planted_everywhere
from tests.support.tiny_run import NUM_STEPS, SAVE_EVERY, adapter, arguments, lines, record, status

FAULTS = "tests.support.faults"


@pytest.fixture
def whole(folder: Path, reference: dict[str, Any]) -> bytes:
    """The adapter of a run that nothing happened to."""
    return adapter(folder / "reference")


def run(folder: Path, out: str, *more: str, fault: str | None = None, **environment: str) -> Ended:
    planted = f"{FAULTS}:{fault}" if fault else None
    log = folder / "logs" / out
    return command.run(arguments(folder, folder / out, *more), log, fault=planted, environment=environment)


def resumes(folder: Path, out: str, whole: bytes, *more: str) -> Ended:
    """The same command again ends with the reference's bits and with figures that count every step once."""
    done = run(folder, out, *more)
    assert done.returncode == 0, done.stderr
    assert adapter(folder / out) == whole
    steps = [line["step"] for line in lines(folder / out) if "loss" in line]
    assert steps == list(range(1, NUM_STEPS + 1))
    uninterrupted, resumed = record(folder / "reference"), record(folder / out)
    assert resumed["losses"] == uninterrupted["losses"]
    assert resumed["batch_digests"] == uninterrupted["batch_digests"]
    assert status(folder / out)["state"] == "completed"
    assert not list((folder / out).glob(".*.part"))
    assert not list((folder / out).glob(".*.old"))
    return done


# --------------------------------------------------------------------------------------------------------------------
# Killed


def test_a_kill_inside_the_optimizers_file_costs_the_steps_since_the_last_checkpoint(
    folder: Path, whole: bytes
) -> None:
    assert run(folder, "half", fault="kill_in_optimizer_file").returncode == -signal.SIGKILL
    half = folder / "half" / "checkpoints" / "checkpoint-10"
    assert (half / "optimizer.pt").is_file()
    assert not (half / SEAL).exists()
    done = resumes(folder, "half", whole)
    assert "checkpoint-10 is not used: it was never sealed" in done.stderr
    assert "checkpoint-5" in done.stderr


def test_an_adapter_in_bfloat16_resumes_in_bfloat16(folder: Path) -> None:
    """PEFT loads it as float32; seen on a GPU, with TRL and a 4-bit base."""
    assert run(folder, "bfloat16", fault="bfloat16_adapter").returncode == 0
    whole = adapter(folder / "bfloat16")
    assert b"BF16" in whole[:1000]
    killed = run(folder, "bfloat16-killed", fault="bfloat16_adapter_and_killed")
    assert killed.returncode == -signal.SIGKILL
    done = run(folder, "bfloat16-killed", fault="bfloat16_adapter")
    assert done.returncode == 0, done.stderr
    assert record(folder / "bfloat16-killed")["resumes"][-1]["step"] == SAVE_EVERY
    assert adapter(folder / "bfloat16-killed") == whole


def test_what_only_a_resume_executes_is_in_no_fresh_runs_key(folder: Path, whole: bytes) -> None:
    """So a gate's measurements, fresh runs all, need not be made again where it is corrected."""
    done = run(folder, "fresh", fault="no_code_for_a_resume")
    assert done.returncode == 0, done.stderr
    assert adapter(folder / "fresh") == whole
    assert run(folder, "resumed", fault="kill_in_optimizer_file").returncode == -signal.SIGKILL
    assert "only a resumed run calls this" in run(folder, "resumed", fault="no_code_for_a_resume").stderr


# --------------------------------------------------------------------------------------------------------------------
# Forge's layers: dropout by counter keeps no random state

FORGE = ("--plan", "kernels=forge", "--plan", "gradient_checkpointing=full", "--plan", "mlp_tile_tokens=48")


@pytest.fixture(scope="module")
def whole_by_forge(folder: Path) -> bytes:
    """The adapter of a run with Forge's layers and dropout that nothing happened to."""
    done = run(folder, "forge", *FORGE)
    assert done.returncode == 0, done.stderr
    assert "kernels=forge: gradients within" in done.stderr
    kept = record(folder / "forge")
    assert (kept["plan"]["kernels"], kept["workload"]["lora"]["dropout"]) == ("forge", 0.1)
    return adapter(folder / "forge")


@pytest.mark.timeout(600)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(step=st.integers(1, NUM_STEPS - 1), number=st.sampled_from([signal.SIGTERM, signal.SIGKILL]))
def test_forges_layers_resume_at_any_step_to_the_same_bits(
    folder: Path, whole_by_forge: bytes, step: int, number: signal.Signals
) -> None:
    """Stopped after the step, or killed in it and resumed from the checkpoint before."""
    out = folder / f"forge-{step}-{number.name}"
    shutil.rmtree(out, ignore_errors=True)  # hypothesis may draw it again
    ended = run(folder, out.name, *FORGE, fault="signal_in_step", STOP_STEP=str(step), STOP_SIGNAL=str(int(number)))
    assert ended.returncode == (-number if number == signal.SIGKILL else 128 + number), ended.stderr
    done = run(folder, out.name, *FORGE)
    assert done.returncode == 0, done.stderr
    assert adapter(out) == whole_by_forge
    assert record(out)["losses"] == record(folder / "forge")["losses"]
    kept = step if number == signal.SIGTERM else (step - 1) // SAVE_EVERY * SAVE_EVERY
    assert kept == 0 or [resume["step"] for resume in record(out)["resumes"]] == [kept]


def test_masks_that_depend_on_what_was_drawn_before_are_seen_in_a_resume(folder: Path) -> None:
    """Why equality to the bit shows something: without the counter a resume is another run."""
    fault = "masks_in_the_order_drawn"
    assert run(folder, "drawn", *FORGE, fault=fault).returncode == 0
    where = {"STOP_STEP": "7", "STOP_SIGNAL": str(int(signal.SIGTERM))}
    assert run(folder, "drawn-stopped", *FORGE, fault="masks_in_the_order_drawn_and_stopped", **where).returncode == 143
    assert run(folder, "drawn-stopped", *FORGE, fault=fault).returncode == 0
    assert adapter(folder / "drawn-stopped") != adapter(folder / "drawn")


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_kill_at_any_write_leaves_a_run_that_resumes_to_the_same_bits(folder: Path) -> None:
    """Crash points: two saves, an evaluation and the end, killed just before a change of a file.

    Every fifth change; with ``CRASH_POINTS=all`` in the environment (as in ``make soak``) every one.
    """
    stride = 1 if os.environ.get("CRASH_POINTS") == "all" else 5
    short = ("--set", "training.max_steps=10")
    count = folder / "count"
    whole = run(folder, "counted", *short, fault="kill_at_write", KILL_AT="0", KILL_COUNT=str(count))
    assert whole.returncode == 0, whole.stderr
    num_points = int(count.read_text())
    assert num_points > 60
    for point in range(1, num_points + 1, stride):
        out = f"point-{point}"
        assert run(folder, out, *short, fault="kill_at_write", KILL_AT=str(point)).returncode == -signal.SIGKILL, point
        run_dir = folder / out
        sealed = [path for path in (run_dir / "checkpoints").glob("checkpoint-*") if (path / SEAL).is_file()]
        assert all(problem(path) is None for path in sealed), point
        steps = [line["step"] for line in lines(run_dir) if "loss" in line]
        if steps and steps[-1] > SAVE_EVERY and record(run_dir)["status"] != "completed":
            assert sealed, f"no checkpoint is left at point {point}, step {steps[-1]}"
        if point % (8 * stride) == 1:
            done = run(folder, out, *short)
            assert done.returncode == 0, done.stderr
            assert adapter(run_dir) == adapter(folder / "counted"), point
            assert record(run_dir)["losses"] == record(folder / "counted")["losses"], point


# --------------------------------------------------------------------------------------------------------------------
# Asked to stop

MOMENTS = ("tokenisation", "load", "rehearsal", "step", "evaluation", "save", "seal")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "moment", [pytest.param(m, marks=() if m in ("load", "evaluation") else pytest.mark.slow) for m in MOMENTS]
)
def test_a_stop_at_any_moment_ends_with_its_code_and_loses_nothing(
    folder: Path, whole: bytes, moment: str, number: int
) -> None:
    out = f"stopped-{moment}-{number}"
    done = run(folder, out, fault="ask_to_stop", STOP_MOMENT=moment, STOP_SIGNAL=str(int(number)))
    assert done.returncode == 128 + number, done.stderr
    assert "Traceback" not in done.stderr
    ended = status(folder / out)
    assert (ended["state"], ended["exit_code"]) == ("interrupted", 128 + number)
    assert not (folder / out / "adapter").exists()
    if moment in ("evaluation", "save", "seal", "step"):
        newest = folder / out / "checkpoints" / ended["checkpoint"]
        assert problem(newest) is None
        assert newest.name == f"checkpoint-{record(folder / out)['num_steps']}"  # of the very step it stopped after
    if (folder / out / "run.json").exists():
        refused = command.run(["export", str(folder / out)], folder / "logs" / "export")
        assert refused.returncode == 3
        assert "interrupted" in refused.stderr
    resumes(folder, out, whole)


def test_twice_means_now_and_without_damage(folder: Path, whole: bytes) -> None:
    environment = {"STOP_MOMENT": "save", "STOP_SIGNAL": str(int(signal.SIGTERM)), "STOP_TIMES": "2"}
    done = run(folder, "twice", fault="ask_to_stop", **environment)
    assert done.returncode == 143
    assert not list((folder / "twice" / "checkpoints").glob(f"*/{SEAL}"))  # it did not wait for the save
    resumes(folder, "twice", whole)


def test_a_run_saves_by_time_too(folder: Path, whole: bytes) -> None:
    often = ("--set", "training.save_every_steps=null", "--set", "training.save_every_minutes=1e-9")
    done = run(folder, "by-time", *often, fault="kill_in_optimizer_file")
    assert done.returncode == -signal.SIGKILL
    assert (folder / "by-time" / "checkpoints" / "checkpoint-9" / SEAL).is_file()
    resumes(folder, "by-time", whole, *often)


# --------------------------------------------------------------------------------------------------------------------
# Numbers gone wrong


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("nan_loss", "step 10: the loss is nan"),
        pytest.param("infinite_loss", "step 10: the loss is inf", marks=pytest.mark.slow),
        pytest.param("nan_gradient", "step 10: a gradient is not finite", marks=pytest.mark.slow),
    ],
)
def test_a_number_that_is_none_ends_the_run_before_it_reaches_the_weights(
    folder: Path, whole: bytes, fault: str, says: str
) -> None:
    done = run(folder, fault, fault=fault)
    assert done.returncode == 7, done.stderr
    assert says in done.stderr
    assert "Its documents: line " in done.stderr
    assert record(folder / fault)["status"] == status(folder / fault)["state"] == "diverged"
    logged = [line["loss"] for line in lines(folder / fault) if "loss" in line]
    assert len(logged) == 9
    assert 0.0 not in logged
    resumes(folder, fault, whole)  # what it kept is sound


@pytest.mark.slow
def test_a_held_out_loss_that_is_no_number_ends_the_run(folder: Path) -> None:
    done = run(folder, "nan-validation", fault="nan_validation")
    assert done.returncode == 7
    assert "held-out loss at step 8 is nan" in done.stderr


def test_spikes_are_reported_and_end_the_run_only_past_the_limit(folder: Path) -> None:
    done = run(folder, "spikes", fault="spiking_loss")
    assert done.returncode == 0, done.stderr
    notes = [note for note in record(folder / "spikes")["notes"] if "times the median" in note]
    assert [note.split(":")[0] for note in notes] == ["step 10", "step 11", "step 12"]
    assert notes[0] in done.stderr
    ended = run(folder, "limited", "--set", "training.spike_limit=2", fault="spiking_loss")
    assert ended.returncode == 7
    assert "step 11" in ended.stderr
    assert "training.spike_limit is 2" in ended.stderr


# --------------------------------------------------------------------------------------------------------------------
# Memory and disk


@pytest.mark.slow
@pytest.mark.parametrize("first_step", [0, 7])
def test_out_of_memory_resumes_with_smaller_micro_batches(folder: Path, first_step: int) -> None:
    """The mathematics stay: 1 x 4 gives what 4 x 1 gives, within rounding."""
    same = ("--set", "lora.dropout=0", "--plan", "rehearsal=false")
    assert run(folder, f"roomy-{first_step}", *same).returncode == 0
    environment = {**os.environ, **planted_everywhere(folder, "out_of_memory"), "FROM_STEP": str(first_step)}
    out = f"tight-{first_step}"
    typed = [sys.executable, "-m", "forge.training", *arguments(folder, folder / out, *same)]
    done = subprocess.run(typed, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    tight, roomy = record(folder / out), record(folder / f"roomy-{first_step}")
    assert tight["plan"]["micro_batch"] == 1
    assert [r["after"] for r in tight["resumes"]] == ["out_of_memory", "out_of_memory"]
    changes = [change for r in tight["resumes"] for change in r["changes"]]
    assert changes == ["plan.micro_batch: 4 -> 2", "plan.micro_batch: 2 -> 1"]
    assert tight["resumes"][-1]["step"] == (5 if first_step else 0)
    assert tight["batch_digests"] == roomy["batch_digests"]
    assert tight["losses"]["last_train_loss"] == pytest.approx(roomy["losses"]["last_train_loss"], rel=1e-3)


def test_out_of_memory_without_a_smaller_micro_batch_ends_with_remedies(folder: Path, whole: bytes) -> None:
    done = run(folder, "full-gpu", "--plan", "micro_batch=1", fault="out_of_memory", ROWS="0", FROM_STEP="7")
    assert done.returncode == 5
    assert "in order of cost: --plan gradient_checkpointing=full" in done.stderr
    assert status(folder / "full-gpu")["state"] == "out_of_memory"
    stopped = run(folder, "kept-plan", "--on-oom", "stop", fault="out_of_memory")
    assert stopped.returncode == 5
    assert "--plan micro_batch=1 (the same mathematics)" in stopped.stderr


def test_a_full_disk_during_a_save_leaves_the_checkpoint_before(folder: Path, whole: bytes) -> None:
    done = run(folder, "full-disk", fault="file_size_limit")
    assert done.returncode == 6, done.stderr
    assert "checkpoint-10" in done.stderr
    assert "Traceback" not in done.stderr
    there = folder / "full-disk" / "checkpoints"
    assert [path.name for path in there.iterdir()] == ["checkpoint-5"]
    assert status(folder / "full-disk")["exit_code"] == 6
    resumes(folder, "full-disk", whole)


def test_a_run_that_cannot_fit_on_the_disk_does_not_begin(folder: Path) -> None:
    done = run(folder, "no-room", fault="no_room_for_checkpoints")
    assert done.returncode == 6
    assert "GB in" in done.stderr
    assert "are free" in done.stderr
    assert not lines(folder / "no-room")


# --------------------------------------------------------------------------------------------------------------------
# The pipeline


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_step_of_the_pipeline_stops_with_it(folder: Path, number: int) -> None:
    out = folder / f"pipeline-{int(number)}"
    training = arguments(folder, out, "--set", "training.max_steps=5000")
    pipeline = command.start(["run", *(a for a in training[1:] if a != "--no-check")], folder / "logs" / out.name)
    log = out / "steps.jsonl"
    assert pipeline.wait_for(lambda: log.is_file() and log.read_text().count('"loss"') >= 6)
    trainer = status(out)["process"]
    assert trainer != pipeline.pid
    pipeline.send_signal(number)
    assert pipeline.wait().returncode == (-number if number == signal.SIGKILL else 128 + number)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{trainer}").exists() and "State:\tZ" not in Path(f"/proc/{trainer}/status").read_text():
        assert time.monotonic() < deadline, "the training process is an orphan"
        time.sleep(0.05)
    ended = status(out)
    assert ended["state"] == "interrupted"
    assert problem(out / "checkpoints" / ended["checkpoint"]) is None
