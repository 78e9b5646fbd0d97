"""The whole gate through its command line: what it lets pass and what it catches. The arms are fake interpreters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from forge.training.backends import load_plan
from forge.training.config.plan import Plan
from forge.training.config.workload import load_workload
from forge.training.system.environment import ROOT
from harness.measurement.results import Store
from harness.perf.claims import CLAIMS
from harness.perf.remaining import num_sessions, remaining
from harness.perf.suite import ABLATION, ITEM_OF_ARM, LEGACY, ORDER, SINGLES, TRIALS, PerfSuite
from harness.session import Session
from tests.support import fake_interpreter
from tests.support.tiny_gate import make_project, run_pytest

ABLATION_RUN = ROOT / "tests" / "data" / "ablation_run.json"  # of an H200; the arm before the last


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("documents") / "train.jsonl"
    path.write_text('{"instruction": "Say it.", "input": "", "output": "It."}\n')
    return path


def gate(
    where: Path, documents: Path, *more: str, gpu: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    arms = {**fake_interpreter.install(documents.parent), **variables}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "harness/perf", "-q", "--no-header"]
    command += ["-p", "no:cacheprovider", *(("-p", "tests.support.fake_gpu") if gpu else ())]
    command += ["--gate-train", str(documents), "--gate-store", str(where / "store")]
    command += ["--benchmark-json", str(where / "results" / "benchmark.json"), *more]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **arms}, capture_output=True, text=True, timeout=300, check=False
    )


def verdicts(where: Path) -> dict[str, str]:
    entries = json.loads((where / "results" / "benchmark.json").read_text())["benchmarks"]
    found = [entry["extra_info"]["verdict"] for entry in entries if entry["extra_info"].get("verdict")]
    return {verdict["name"]: verdict["status"] for verdict in found}


@pytest.mark.slow
def test_a_gate_whose_claims_hold_is_green_and_its_report_says_so(tmp_path: Path, documents: Path) -> None:
    used = {"ARM_USED": str(tmp_path / "used")}
    done = gate(tmp_path, documents, **used)
    assert done.returncode == 0, done.stdout[-3000:]
    assert set(verdicts(tmp_path).values()) == {"PASS"}
    assert len(verdicts(tmp_path)) == len(CLAIMS)
    runs = len(list((tmp_path / "store" / "runs").glob("*.json")))
    again = gate(tmp_path, documents, **used)
    assert again.returncode == 0
    assert len(list((tmp_path / "store" / "runs").glob("*.json"))) == runs, "something was measured twice"
    command = [sys.executable, "-m", "harness.report", str(tmp_path / "results" / "benchmark.json")]
    command += ["-o", str(tmp_path / "report"), "--store", str(tmp_path / "store")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    assert "6 of 6 claims passed" in (tmp_path / "report" / "report.md").read_text()


CLAIMED = ("--gate-only", "genome_full,legacy_256,control_aa", "-k", "test_claims")
WHOLE_DOCUMENTS = ("--gate-only", "genome_full", "-k", "test_claims and whole_documents")


def test_a_planted_speed_of_one_point_nine_is_caught(tmp_path: Path, documents: Path) -> None:
    done = gate(tmp_path, documents, *CLAIMED, ARM_SECONDS='{"legacy": 1.9, "unsloth": 1.0}')
    assert done.returncode == 1
    found = verdicts(tmp_path)
    assert found["genome_full_speed"] == found["legacy_256_speed"] == "FAIL"
    assert found["genome_full_peak_allocated"] == found["control_aa"] == "PASS"
    assert "misses the bar of at least 2" in done.stdout


@pytest.mark.slow
def test_a_planted_tenth_more_memory_is_caught(tmp_path: Path, documents: Path) -> None:
    most = int(0.19 * (70 << 30))

    def with_bytes(where: Path, num_bytes: int) -> subprocess.CompletedProcess[str]:
        taken = {"ARM_BYTES": json.dumps({"unsloth": num_bytes}), "ARM_USED": str(where.with_suffix(".used"))}
        return gate(where, documents, *WHOLE_DOCUMENTS, **taken)

    assert with_bytes(tmp_path / "a", most).returncode == 0
    done = with_bytes(tmp_path / "b", int(most * 1.1))
    assert done.returncode == 1
    assert verdicts(tmp_path / "b")["genome_full_peak_allocated"] == "FAIL"
    assert verdicts(tmp_path / "b")["genome_full_speed"] == "PASS"


def test_arms_that_do_other_work_are_refused_with_both_values(tmp_path: Path, documents: Path) -> None:
    done = gate(tmp_path, documents, *CLAIMED, ARM_CHANGES_WORKLOAD="unsloth")
    assert done.returncode == 1
    assert "not the same work" in done.stdout
    assert "workload_sha256: " in done.stdout
    assert verdicts(tmp_path)["genome_full_speed"] == "FAIL"
    assert verdicts(tmp_path)["control_aa"] == "PASS"


def test_a_candidate_out_of_memory_fails_and_a_baseline_gains_it_nothing(tmp_path: Path, documents: Path) -> None:
    assert gate(tmp_path / "a", documents, *WHOLE_DOCUMENTS, ARM_OUT_OF_MEMORY="unsloth").returncode == 1
    assert verdicts(tmp_path / "a")["genome_full_speed"] == "FAIL"
    assert gate(tmp_path / "b", documents, *WHOLE_DOCUMENTS, ARM_OUT_OF_MEMORY="legacy").returncode == 1
    assert verdicts(tmp_path / "b")["genome_full_speed"] == "INCONCLUSIVE"


def test_a_context_that_cannot_be_measured_leaves_the_others(tmp_path: Path, documents: Path) -> None:
    done = gate(tmp_path, documents, "--gate-only", "max_context", "-k", "context", ARM_CONTEXT_FAILS="trl")
    assert done.returncode == 1
    assert "6 passed" in done.stdout
    assert "3 failed" in done.stdout
    assert "the max_context probe of trl failed: exit code 4" in done.stdout
    assert len(list((tmp_path / "store" / "probes").glob("max_context-*.json"))) == 6
    whole = {item.name: item for item in remaining(Store(tmp_path / "store"))}
    assert (whole["max_context"].num_done, len(whole["max_context"].units)) == (6, 3)


def test_a_session_without_time_is_incomplete_and_red(tmp_path: Path, documents: Path) -> None:
    done = gate(tmp_path, documents, "--gate-seconds", "0.001", "-k", "test_claims or arithmetic")
    assert done.returncode == 1
    assert set(verdicts(tmp_path).values()) <= {"INCOMPLETE"}
    assert "INCOMPLETE" in done.stdout


def test_what_remains_is_what_a_store_lacks(tmp_path: Path, documents: Path) -> None:
    whole = {item.name: item for item in remaining(Store(tmp_path / "store"))}
    assert [item.num_done + len(item.units) for item in whole.values()][:3] == [5, 5, 5]
    ablation = whole["ablation"]
    assert (ablation.num_done, len(ablation.units)) == (2, len(ABLATION) - 2), "two are the claims' arms"
    assert (
        gate(tmp_path, documents, "--gate-only", "control_aa,matmul_peak", "-k", "control or arithmetic").returncode
        == 1
    )
    after = {item.name: item for item in remaining(Store(tmp_path / "store"))}
    assert (after["control_aa"].units, after["matmul_peak"].units) == ((), ())
    assert after["genome_full"] == whole["genome_full"]
    assert after["legacy_256"].units[0] < whole["legacy_256"].units[0], "the store knows better what an arm takes"
    assert num_sessions([200, 200, 200, 90, 10], 470) == 2


@pytest.mark.parametrize("changed", [None, "plan", "code"])
def test_a_run_of_another_plan_or_of_other_code_remains_to_be_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str | None
) -> None:
    run = json.loads(ABLATION_RUN.read_text())
    code = run["key_parts"]["code"]
    run["key_parts"]["plan"] = Plan.model_validate(run["key_parts"]["plan"]).model_dump(mode="json")  # fields since
    monkeypatch.setattr("harness.perf.remaining.code_sha256", lambda: code)
    before = {item.name: item.num_done for item in remaining(Store(tmp_path))}
    if changed:
        run["key_parts"][changed] = "another"
    (tmp_path / "runs").mkdir(parents=True)
    (tmp_path / "runs" / f"{run['run_id']}.json").write_text(json.dumps(run))
    after = {item.name: item.num_done for item in remaining(Store(tmp_path))}
    assert after == before | {"ablation": before["ablation"] + (changed is None)}


def test_what_a_session_names_is_measured_in_that_order(
    tmp_path: Path, documents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    monkeypatch.setattr(PerfSuite, "_parts_of", lambda self, name: measured.append(name) or [])
    PerfSuite(Session(Store(tmp_path), documents, only=("max_context", "singles"))).measure_all()
    assert measured == ["max_context", "singles"]
    PerfSuite(Session(Store(tmp_path), documents)).measure_all()
    assert measured[2:] == list(ORDER)


def test_a_name_that_no_suite_measures_is_refused_at_once(tmp_path: Path, documents: Path) -> None:
    done = gate(tmp_path, documents, "--gate-only", "parity,ladder")
    assert done.returncode == 4
    assert "'ladder'" in done.stderr


def test_a_session_tells_what_the_store_has_of_what_it_leaves_out(tmp_path: Path, documents: Path) -> None:
    def arithmetic(*only: str) -> list[str]:
        gate(tmp_path, documents, "--gate-only", *only, "-k", "arithmetic and genome_full")
        entries = json.loads((tmp_path / "results" / "benchmark.json").read_text())["benchmarks"]
        return [entry["extra_info"]["record_kind"] for entry in entries]

    no_time = ("control_aa", "--gate-seconds", "0.001")
    assert arithmetic(*no_time) == ["not_run"]
    assert arithmetic("matmul_peak") == ["matmul_peak"]
    assert arithmetic(*no_time) == ["matmul_peak"]


def test_without_a_gpu_the_gate_exits_with_4_and_says_so(tmp_path: Path, documents: Path) -> None:
    done = gate(tmp_path, documents, gpu=False, CUDA_VISIBLE_DEVICES="-1")
    assert done.returncode == 4
    assert "needs a CUDA GPU" in done.stdout + done.stderr


def test_without_documents_the_gate_says_which_option_names_them(tmp_path: Path) -> None:
    done = gate(tmp_path, tmp_path / "absent.jsonl")
    assert done.returncode == 1
    assert "--gate-train" in done.stdout


SKIPS = """
@pytest.mark.gpu
def test_in_its_body():
    pytest.skip("no time")

@pytest.mark.gpu
@pytest.mark.skipif(True, reason="not today")
def test_by_a_marker():
    pass

def test_of_something_else():
    pytest.skip("not a test of the gate")
"""


def test_a_skipped_test_of_the_gate_is_a_failed_one(tmp_path: Path) -> None:
    project = make_project(tmp_path, SKIPS)
    done = run_pytest(project, "-m", "gpu or not gpu", "-p", "tests.support.fake_gpu")
    assert done.returncode == 1
    assert "1 failed, 1 skipped, 1 error" in done.stdout  # what a marker skips is skipped in its set-up
    assert "a gate that skips proves nothing" in done.stdout


def test_parity_is_judged_before_speed_and_speed_before_export(tmp_path: Path) -> None:
    for suite in ("export", "parity", "perf", "reliability"):
        (tmp_path / "harness" / suite).mkdir(parents=True)
        (tmp_path / "harness" / suite / f"test_{suite}.py").write_text(f"def test_{suite}():\n    pass\n")
    project = make_project(tmp_path, "def test_other():\n    pass\n")
    listed = run_pytest(project, "--collect-only", "-q", "harness").stdout
    places = [listed.index(f"::test_{name}") for name in ("other", "parity", "perf", "export", "reliability")]
    assert places == sorted(places)


def test_every_claim_is_held_by_a_trial_and_every_plan_can_be_carried_out(documents: Path, tmp_path: Path) -> None:
    assert {claim.trial for claim in CLAIMS} <= set(TRIALS)
    suite = PerfSuite(Session(Store(tmp_path / "store"), documents))
    specs = [suite.spec(workload, arm) for workload, arm in (*SINGLES, *ABLATION)]
    specs += [suite.spec(p.workload, arm) for p in TRIALS.values() for arm in (p.baseline, p.candidate)]
    for spec in specs:
        load_plan(load_workload(spec.workload, spec.overrides), spec.backend, spec.plan_overrides)
    assert suite.spec(*ABLATION[0]) == suite.spec("genome_full", LEGACY), "the ablation starts at the claims' own arm"
    assert ITEM_OF_ARM["genome_full", LEGACY] == "genome_full"
    assert {"control_aa"} == set(TRIALS) - set(ITEM_OF_ARM.values())
