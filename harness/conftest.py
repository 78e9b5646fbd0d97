"""The gate's session, shared by all suites, and how a verdict is recorded and asserted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.measurement.results import Store
from harness.measurement.runner import TIME_LIMIT_SECONDS
from harness.pytest_plugin import announcer, gate_deadline, gate_only
from harness.recorder import record_facts, record_metric
from harness.session import MODEL, Session
from harness.verdict import Hold, Verdict


@pytest.fixture(scope="session")
def gate(pytestconfig: pytest.Config) -> Session:
    """The session, by pytest's options; a suite takes ``gate.limited_to(its name)``."""
    option = pytestconfig.getoption
    if not option("--gate-train"):
        raise pytest.UsageError("the gate trains on real documents: --gate-train FILE (docs/gate.md)")
    return Session(
        store=Store(option("--gate-store")),
        train=Path(option("--gate-train")).absolute(),
        model=option("--gate-model") or MODEL,
        deadline=gate_deadline(pytestconfig),
        only=gate_only(pytestconfig),
        run_seconds=option("--gate-run-seconds") or TIME_LIMIT_SECONDS,
        announce=announcer(pytestconfig),
    )


@pytest.fixture
def hold(benchmark: Any) -> Hold:
    """Record a verdict as this test's entry, then assert that it is a PASS.

    ``hold(verdict, record_kind=..., **extra_info)``; with ``samples`` and ``unit`` the entry has those measured values.
    """

    def record_and_assert(
        verdict: Verdict, *, metric: str | None = None, samples: Any = None, unit: Any = None, **extra: Any
    ) -> None:
        entry = {"metric": metric or verdict.name, "verdict": verdict.to_dict(), "run_ids": verdict.run_ids, **extra}
        if samples:
            record_metric(benchmark, samples, unit=unit, **entry)
        else:
            record_facts(benchmark, **entry)
        assert verdict.status == "PASS", f"{verdict.status}: {verdict.statement} {verdict.reason}"

    return record_and_assert
