"""One session of measuring before the tests of this folder: they record and judge, they do not measure."""

from __future__ import annotations

import pytest

from harness.measurement.results import Store
from harness.measurement.runner import TIME_LIMIT_SECONDS
from harness.perf.session import Gate
from harness.perf.suite import MODEL, ORDER
from harness.pytest_plugin import OTHER_ROOMS, announcer, gate_deadline, gate_documents, gate_only


@pytest.fixture(scope="session")
def gate(pytestconfig: pytest.Config) -> Gate:
    """The gate, with everything measured that the time allowed."""
    option = pytestconfig.getoption
    gate = Gate(
        store=Store(option("--gate-store")),
        train=gate_documents(pytestconfig),
        model=option("--gate-model") or MODEL,
        deadline=gate_deadline(pytestconfig),
        run_seconds=option("--gate-run-seconds") or TIME_LIMIT_SECONDS,
        may_halve=option("--gate-halves"),
        only=_only(pytestconfig),
        announce=announcer(pytestconfig),
    )
    gate.measure_all()
    return gate


def _only(config: pytest.Config) -> tuple[str, ...]:
    """What ``--gate-only`` names of this folder; the rest are other folders."""
    if not config.getoption("--gate-only"):
        return ORDER
    return tuple(name for name in gate_only(config) if name not in OTHER_ROOMS)
