"""What an accident means: the same status in every suite, and never a verdict on what was not measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from forge.training.system.errors import (
    CheckError,
    ConfigurationError,
    DataError,
    DiskError,
    ForgeError,
    GpuMemoryError,
    LockedError,
    MachineError,
)
from harness.export.exports import Exports
from harness.measurement.results import RunSpec, Store
from harness.parity import rungs
from harness.parity.session import Ladder
from harness.perf.claims import CLAIMS
from harness.perf.suite import PerfSuite
from harness.reliability.claims import CLAIMS as SURVIVAL
from harness.reliability.suite import verdict as survival_verdict
from harness.session import Session
from harness.verdict import Status, Verdict, by_faults, status_of_error, status_of_run, worst

ACCIDENTS = {
    "an argument is wrong (exit 2)": ConfigurationError("no such key"),
    "the GPU is in use (exit 4)": MachineError("in use"),
    "the disk is full (exit 6)": DiskError("full"),
    "another process holds the store (exit 9)": LockedError("locked"),
    "a child found the GPU in use": ForgeError.of_child(4, "exit code 4"),
    "a child found the disk full": ForgeError.of_child(6, "exit code 6"),
    "a child found the store locked": ForgeError.of_child(9, "exit code 9"),
    "a child was interrupted": ForgeError.of_child(-2, "SIGINT"),
}
FINDINGS = {
    "a check failed (exit 8)": CheckError("other work"),
    "the data cannot be used (exit 3)": DataError("damaged"),
    "the memory does not suffice (exit 5)": GpuMemoryError("too small"),
    "a child crashed": ForgeError.of_child(-11, "SIGSEGV"),
    "a child has a bug": ForgeError.of_child(1, "exit code 1"),
}


def parity_verdict(session: Session) -> Verdict:
    """Rung 1 between the candidate and itself, so that the error is the candidate's."""
    (session.store.directory.parent / "base").mkdir()
    ladder = Ladder(session, base=str(session.store.directory.parent / "base"), baseline="unsloth", num_side_by_side=1)
    return rungs.verdict(ladder, 1)


# How each suite comes to a verdict while everything that it measures raises an error.
SUITES: dict[str, Callable[[Session], Verdict]] = {
    "perf": lambda session: PerfSuite(session).verdict(CLAIMS[0]),
    "parity": parity_verdict,
    "export": lambda session: Exports(session, RunSpec(backend="trl", workload="smoke")).verdict("merge"),
    "reliability": lambda session: survival_verdict(session, SURVIVAL[0], "trl"),
}


def session_that_fails(folder: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, error: ForgeError) -> Session:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise error

    for measure in ("run_single", "run_trial", "run_probe"):
        monkeypatch.setattr(f"harness.session.{measure}", fail)
    monkeypatch.setattr(Exports, "exported", fail)  # training and exporting: commands, not runs of the store
    return Session(Store(folder / "store"), corpus)


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("what", [*ACCIDENTS, *FINDINGS])
def test_an_error_means_the_same_in_every_suite(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, suite: str, what: str
) -> None:
    error = {**ACCIDENTS, **FINDINGS}[what]
    verdict = SUITES[suite](session_that_fails(tmp_path, corpus, monkeypatch, error))
    assert verdict.status == ("INCOMPLETE" if what in ACCIDENTS else "FAIL")
    assert error.message in verdict.reason


def test_an_error_of_the_baseline_leaves_nothing_to_compare_with() -> None:
    assert {status_of_error(error, "baseline") for error in FINDINGS.values()} == {"INCONCLUSIVE"}
    assert {status_of_error(error, "baseline") for error in ACCIDENTS.values()} == {"INCOMPLETE"}


@pytest.mark.parametrize(
    ("status", "candidate", "baseline"),
    [
        ("completed", None, None),
        ("refused", "INCOMPLETE", "INCOMPLETE"),
        *((status, "FAIL", "INCONCLUSIVE") for status in ("out_of_memory", "diverged", "timeout", "crashed")),
        ("no_record", "FAIL", "INCONCLUSIVE"),
    ],
)
def test_a_run_that_did_not_complete_is_judged_by_its_role(
    status: str, candidate: Status | None, baseline: Status | None
) -> None:
    assert (status_of_run(status, "candidate"), status_of_run(status, "baseline")) == (candidate, baseline)


def test_the_worst_of_several_counts_and_nothing_is_not_a_pass() -> None:
    assert worst(["PASS", "FAIL", "INCONCLUSIVE"]) == "FAIL"
    assert worst(["PASS", "INCOMPLETE"]) == "INCOMPLETE"
    assert worst([]) == "INCOMPLETE"
    assert by_faults([], "looked at") == ("PASS", "looked at")
    assert by_faults(["a", "b"], "looked at") == ("FAIL", "a; b")
