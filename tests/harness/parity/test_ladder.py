"""The ladder as a whole: each rung stands on those below, nothing is measured twice, and what an accident means."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from forge.training.system.environment import ROOT
from forge.training.system.errors import ForgeError
from harness.parity.claims import LEAST_SEEDS, verdict_on
from harness.parity.rungs import architecture_verdict, verdict
from harness.parity.simulation import Recorded
from harness.parity.suite import ARCHITECTURES, PILOT_SEEDS, PLANS
from tests.support.recorded_ladder import LAYOUTS, Runs, make_ladder


def test_a_sound_candidate_climbs_the_ladder_and_nothing_is_measured_twice(
    tmp_path: Path, corpus: Path, recorded: Recorded
) -> None:
    runs = Runs(recorded)
    ladder = make_ladder(tmp_path, corpus, runs)
    for number in (6, 5, 4):
        assert verdict(ladder, number).status == "PASS", verdict(ladder, number).reason
    assert runs.num_started == len(LAYOUTS) + 2 + 2 * len(PILOT_SEEDS) + 3 * LEAST_SEEDS
    figures = verdict(ladder, 6).figures
    assert len(figures["seeds"]) == LEAST_SEEDS
    assert not {row["seed"] for row in figures["seeds"]} & set(PILOT_SEEDS)
    assert figures["precision"] == {"baseline": ["float32"], "candidate": ["float32"], "stock": ["bfloat16"]}
    assert all(math.isclose(row["difference_to_stock"], row["difference"] - 0.02) for row in figures["seeds"])
    assert len(verdict(ladder, 5).figures["curves"]["loss"]["half_width"]) == 100
    assert json.loads(json.dumps(verdict(ladder, 6).to_dict(), allow_nan=False))["name"] == "outcome"
    again = make_ladder(tmp_path, corpus, Runs(recorded), measures=False)
    assert verdict(again, 6) == verdict(ladder, 6)


def test_each_rung_stands_on_the_one_below(tmp_path: Path, corpus: Path, recorded: Recorded) -> None:
    runs = Runs(recorded)
    ladder = make_ladder(tmp_path, corpus, runs)
    ladder.verdicts[3] = verdict_on(3, "FAIL", "a layout has another gradient")
    assert {verdict(ladder, number).status for number in (4, 5, 6)} == {"INCOMPLETE"}
    assert "rung 3 (step equivalence) is FAIL" in verdict(ladder, 4).reason
    assert runs.num_started == 0


def test_a_session_without_time_is_incomplete_and_a_later_one_resumes(
    tmp_path: Path, corpus: Path, recorded: Recorded
) -> None:
    late = make_ladder(tmp_path, corpus, Runs(recorded), deadline=0.0)
    assert verdict(late, 4).status == "INCOMPLETE"
    assert "0 of 8 runs" in verdict(late, 4).reason
    assert verdict(make_ladder(tmp_path, corpus, Runs(recorded)), 4).status == "PASS"


ACCIDENTS = [
    *(("unsloth", code, "FAIL") for code in (1, 3, 5, 7, 8)),
    *(("trl", code, "INCONCLUSIVE") for code in (1, 5, 8)),
    *((backend, code, "INCOMPLETE") for backend in ("trl", "unsloth") for code in (2, 4, 6, 9, -2, -15)),
]


@pytest.mark.parametrize(("backend", "exit_code", "status"), ACCIDENTS)
def test_a_probe_that_fails_counts_by_its_exit_code_and_whose_it_is(
    tmp_path: Path,
    corpus: Path,
    recorded: Recorded,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    exit_code: int,
    status: str,
) -> None:
    def run_probe(module: str, of: str, *_: Any, **__: Any) -> dict[str, Any]:
        if of == backend:
            raise ForgeError.of_child(exit_code, "this went wrong")
        return {"inputs": {"backend": of}}

    monkeypatch.setattr("harness.session.run_probe", run_probe)
    monkeypatch.setattr("harness.parity.architectures.make_base_as", lambda base, of, directory: directory.mkdir())
    ladder = make_ladder(tmp_path, corpus, Runs(recorded), below=1)
    (ladder.folder / "bases").mkdir(parents=True)
    for judged in (verdict(ladder, 1), architecture_verdict(ladder, "llama")):
        assert judged.status == status
        assert "this went wrong" in judged.reason
    assert verdict(ladder, 2).status == "INCOMPLETE"


@pytest.mark.parametrize(
    ("faults", "rung", "status"),
    [
        ({"trl": "out_of_memory"}, 4, "INCONCLUSIVE"),
        ({"trl": "refused"}, 4, "INCOMPLETE"),
        ({"unsloth": "diverged"}, 5, "FAIL"),
        ({"unsloth": "refused"}, 5, "INCOMPLETE"),
        ({"control": "crashed"}, 5, "INCONCLUSIVE"),
        ({"control": "refused"}, 5, "INCOMPLETE"),
    ],
)
def test_a_run_that_ends_early_counts_by_how_it_ended_and_whose_it_is(
    tmp_path: Path, corpus: Path, recorded: Recorded, faults: dict[str, str], rung: int, status: str
) -> None:
    judged = verdict(make_ladder(tmp_path, corpus, Runs(recorded, **faults)), rung)
    assert judged.status == status
    assert next(iter(faults.values())) in judged.reason


@pytest.mark.parametrize("rung", [5, 6])
def test_a_learning_rate_a_tenth_off_is_named_by_the_step_logs_of_every_run(
    tmp_path: Path, corpus: Path, recorded: Recorded, rung: int
) -> None:
    ladder = make_ladder(tmp_path, corpus, Runs(recorded, **{"rate of unsloth": 1.1}), below=rung)
    assert verdict(ladder, rung).status == "FAIL"
    assert "learning_rate, step 1: 0.002 | 0.0022" in verdict(ladder, rung).reason


def test_a_ladder_that_may_not_measure_is_red_and_says_why(tmp_path: Path, corpus: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "harness/parity", "-q", "--no-header"]
    command += ["-p", "no:cacheprovider", "-p", "tests.support.fake_gpu"]
    command += ["--gate-train", str(corpus), "--gate-store", str(tmp_path / "store"), "--gate-only", "matmul_peak"]
    command += ["--benchmark-json", str(tmp_path / "benchmark.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stdout[-2000:]
    entries = json.loads((tmp_path / "benchmark.json").read_text())["benchmarks"]
    assert {entry["extra_info"]["record_kind"] for entry in entries} == {"parity"}
    assert [entry["extra_info"]["metric"] for entry in entries][:6] == [f"rung {number}" for number in range(1, 7)]
    assert len(entries) == 6 + len(ARCHITECTURES) + len(PLANS)
    assert {entry["extra_info"]["verdict"]["status"] for entry in entries} == {"INCOMPLETE"}
    assert done.stdout.count("rung 1 (inputs) is INCOMPLETE") >= 5, "a rung above says which one is missing"
