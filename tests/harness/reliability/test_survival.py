"""The reliability claims of the gate: what the probe finds on a CPU, and that each fault turns one red."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.measurement.results import Store
from harness.reliability.claims import CLAIMS, STOP_LIMIT_SECONDS, Survival
from tests.support.run_command import ROOT
from tests.support.tiny_training import arguments, write_inputs

SAME = {"identical": True, "largest": 0.0, "relative": 0.0, "largest_loss": 0.0, "first_different_step": None}
APART = {"identical": False, "largest": 1e-3, "relative": 1e-4, "largest_loss": 1e-4, "first_different_step": 11}
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


def judge(name: str, answer: dict[str, Any]) -> list[str]:
    faults: list[str] = CLAIMS[name][1](answer)[0]
    return faults


@pytest.mark.parametrize("name", CLAIMS)
def test_what_is_sound_passes(name: str) -> None:
    assert judge(name, ANSWERS[name]) == []


FAULTS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "the killed run differs": ("resume", lambda a: a["killed"].update(difference=APART)),
    "the stopped run differs": ("resume", lambda a: a["stopped"].update(difference=APART)),
    "so do two whole runs": ("resume", lambda a: a.update(noise=APART)),
    "it began anew": ("resume", lambda a: a["stopped"].update(resumed_from_step=0)),
    "it trained on other labels": ("resume", lambda a: a["killed"].update(same_labels=False)),
    "the optimizer came first": (
        "callbacks",
        lambda a: a["events"].append(
            STEP.replace("pre_optimizer_step optimizer_step", "optimizer_step pre_optimizer_step")
        ),
    ),
    "nobody looked at the gradients": (
        "callbacks",
        lambda a: a["events"].append(STEP.replace("pre_optimizer_step ", "")),
    ),
    "saved before the log": ("callbacks", lambda a: a["events"].append(STEP.replace("log", "save log"))),
    "saved before the evaluation": ("callbacks", lambda a: a["events"].append(f"{STEP} save evaluate")),
    "nothing was saved": ("callbacks", lambda a: a.update(events=[STEP])),
    "too slow": ("stop", lambda a: a.update(stop_seconds=STOP_LIMIT_SECONDS + 1)),
    "unsealed": ("stop", lambda a: a.update(checkpoint_problem=["unsealed", "..."])),
    "ended as complete": ("stop", lambda a: a.update(state="completed")),
    "there was room": ("memory", lambda a: a.update(resumes=[])),
    "documents were lost": ("memory", lambda a: a["documents"].__setitem__(2, 4)),
    "steps were lost": ("memory", lambda a: a.update(num_steps=3)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_turns_its_claim_red(fault: str) -> None:
    name, plant = FAULTS[fault]
    answer = copy.deepcopy(ANSWERS[name])
    plant(answer)
    assert len(judge(name, answer)) == 1


def test_what_there_is_no_time_for_is_incomplete(tmp_path: Path) -> None:
    survival = Survival(Store(tmp_path), tmp_path / "train.jsonl", "tiny", measures=False)
    assert survival.finding("resume", "trl").status == "INCOMPLETE"


@pytest.mark.slow
def test_the_probe_kills_and_stops_real_runs(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    settings = arguments(tmp_path, tmp_path / "unused")[4:-2]  # without train, workload, backend and directory
    probe = [
        sys.executable,
        "-m",
        "harness.reliability.probes.survival",
        "smoke",
        "--backend",
        "trl",
        "--after-steps",
        "7",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*probe, *settings], capture_output=True, text=True, env=environment, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["noise"]["identical"]
    assert judge("resume", answer) == []
    assert judge("callbacks", answer) == []
