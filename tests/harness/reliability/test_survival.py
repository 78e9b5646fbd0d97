"""The reliability claims of the gate: what the probe finds on a CPU, and that each fault turns one red."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forge.training.system.errors import DiskError, ForgeError, GpuMemoryError, LockedError, MachineError
from harness.measurement.results import Store
from harness.recorder import CLOCK
from harness.reliability import test_survival as gate
from harness.reliability.claims import CLAIMS, STOP_LIMIT_SECONDS
from harness.reliability.probes.survival import Runs
from harness.reliability.suite import verdict
from harness.session import Session
from harness.verdict import Hold
from tests.support.run_command import ROOT
from tests.support.tiny_run import settings, write_inputs

SAME = {"identical": True, "largest": 0.0, "relative": 0.0, "largest_loss": 0.0, "first_different_step": None}
DIFFERENT = {"identical": False, "largest": 1e-3, "relative": 1e-4, "largest_loss": 1e-4, "first_different_step": 11}
STEP = "step_begin substep_end pre_optimizer_step optimizer_step step_end log"
RESUMED = {"difference": SAME, "resumed_from_step": 10, "num_steps": 40, "same_labels": True}
SMALL: dict[str, Any] = {
    "noise": SAME,
    "killed": dict(RESUMED),
    "stopped": dict(RESUMED),
    "events": [STEP, f"{STEP} save", f"{STEP} log evaluate save"],
}
LARGE: dict[str, Any] = {"stop_seconds": 5.0, "state": "interrupted", "checkpoint_problem": None, "checkpoint_bytes": 9}
TIGHT: dict[str, Any] = {
    "cap_gib": 8.0,
    "micro_batch": 2,
    "resumes": [{"after": "out_of_memory"}],
    "num_steps": 4,
    "num_planned_steps": 4,
    "documents": [8, 8, 8, 8],
}
ANSWERS = {"resume": SMALL, "callbacks": SMALL, "stop": LARGE, "memory": TIGHT}
BY_NAME = {claim.name: claim for claim in CLAIMS}


@pytest.mark.parametrize("name", BY_NAME)
def test_what_is_sound_passes(name: str) -> None:
    assert BY_NAME[name].verdict(ANSWERS[name]).status == "PASS"


FAULTS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "the killed run differs": ("resume", lambda a: a["killed"].update(difference=DIFFERENT)),
    "the stopped run differs": ("resume", lambda a: a["stopped"].update(difference=DIFFERENT)),
    "so do two whole runs": ("resume", lambda a: a.update(noise=DIFFERENT)),
    "it started again": ("resume", lambda a: a["stopped"].update(resumed_from_step=0)),
    "it trained on other labels": ("resume", lambda a: a["killed"].update(same_labels=False)),
    "the optimizer came first": (
        "callbacks",
        lambda a: a["events"].append(
            STEP.replace("pre_optimizer_step optimizer_step", "optimizer_step pre_optimizer_step")
        ),
    ),
    "the gradients were not checked": (
        "callbacks",
        lambda a: a["events"].append(STEP.replace("pre_optimizer_step ", "")),
    ),
    "saved before the log": ("callbacks", lambda a: a["events"].append(STEP.replace("log", "save log"))),
    "saved before the evaluation": ("callbacks", lambda a: a["events"].append(f"{STEP} save evaluate")),
    "nothing was saved": ("callbacks", lambda a: a.update(events=[STEP])),
    "too slow": ("stop", lambda a: a.update(stop_seconds=STOP_LIMIT_SECONDS + 1)),
    "unsealed": ("stop", lambda a: a.update(checkpoint_problem=["unsealed", "..."])),
    "ended as complete": ("stop", lambda a: a.update(state="completed")),
    "everything fitted": ("memory", lambda a: a.update(resumes=[])),
    "documents were lost": ("memory", lambda a: a["documents"].__setitem__(2, 4)),
    "steps were lost": ("memory", lambda a: a.update(num_steps=3)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_turns_its_claim_red(fault: str) -> None:
    name, plant = FAULTS[fault]
    answer = copy.deepcopy(ANSWERS[name])
    plant(answer)
    judged = BY_NAME[name].verdict(answer)
    assert (judged.status, "; " in judged.reason) == ("FAIL", False), judged.reason  # for one reason


@pytest.fixture
def session(tmp_path: Path) -> Session:
    (tmp_path / "train.jsonl").touch()
    return Session(Store(tmp_path / "store"), tmp_path / "train.jsonl", model="tiny")


def test_what_there_is_no_time_for_is_incomplete(session: Session) -> None:
    assert verdict(replace(session, deadline=0.0), BY_NAME["resume"], "trl").status == "INCOMPLETE"
    left_out = verdict(replace(session, only=("parity",)).limited_to("reliability"), BY_NAME["resume"], "trl")
    assert (left_out.status, "--gate-only" in left_out.reason) == ("INCOMPLETE", True)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MachineError("the GPU is in use"), "INCOMPLETE"),
        (DiskError("no space left"), "INCOMPLETE"),
        (LockedError("the store is in use"), "INCOMPLETE"),
        (GpuMemoryError("out of memory"), "FAIL"),
        (ForgeError("the run 'stopped' ended with 1, not 143"), "FAIL"),
    ],
)
def test_an_accident_is_no_failure_of_the_run(
    session: Session, monkeypatch: pytest.MonkeyPatch, error: ForgeError, status: str
) -> None:
    def probe(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("harness.session.run_probe", probe)
    judged = verdict(session, BY_NAME["stop"], "trl")
    assert (judged.status, judged.reason) == (status, str(error))


@pytest.mark.parametrize(
    ("code", "is_resumed", "exit_code"),
    [(6, False, 6), (6, True, 1), (0, False, 1), (-15, False, 1), (5, False, 5)],
)
def test_a_run_that_ends_otherwise_gives_the_probe_its_exit_code_unless_it_was_to_resume(
    tmp_path: Path, code: int, is_resumed: bool, exit_code: int
) -> None:
    (tmp_path / "a.log").write_text("why")
    end = f"import os; os._exit({code})" if code >= 0 else f"import os; os.kill(os.getpid(), {-code})"
    process = subprocess.Popen([sys.executable, "-c", end])
    with pytest.raises(ForgeError, match="why") as raised:
        Runs(tmp_path, []).wait("a", process, 143, is_resumed=is_resumed)
    assert raised.value.exit_code == exit_code


@pytest.mark.benchmark(timer=CLOCK)
def test_an_entry_names_the_probe_in_the_store(
    session: Session, hold: Hold, benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = {**LARGE, "key": "0123456789ab" * 5}
    monkeypatch.setattr("harness.session.run_probe", lambda *_, **__: stored)
    gate.test_a_run_survives_what_the_claim_says(session, hold, BY_NAME["stop"], "trl")
    assert benchmark.extra_info["probe"] == stored["key"]
    assert benchmark.extra_info["verdict"]["name"] == "stop_trl"


@pytest.mark.slow
def test_the_probe_kills_and_stops_real_runs(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    probe = [sys.executable, "-m", "harness.reliability.probes.survival", "smoke", "--backend", "trl"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*probe, "--after-steps", "7", *settings(tmp_path), "--set", "training.max_steps=40"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["noise"]["identical"]
    for name in ("resume", "callbacks"):
        assert BY_NAME[name].verdict(answer).status == "PASS"
