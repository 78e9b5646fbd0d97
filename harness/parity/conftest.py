"""The session's ladder: tests of this folder ask it for verdicts and record them."""

from __future__ import annotations

import pytest

from harness.measurement.results import Store
from harness.parity.session import Ladder
from harness.pytest_plugin import announcer, gate_deadline, gate_documents, room_measures


@pytest.fixture(scope="session")
def ladder(pytestconfig: pytest.Config) -> Ladder:
    """The parity ladder. Left out of ``--gate-only``, it measures nothing and judges what the store has."""
    option = pytestconfig.getoption
    return Ladder(
        store=Store(option("--gate-store")),
        train=gate_documents(pytestconfig),
        deadline=gate_deadline(pytestconfig),
        measures=room_measures(pytestconfig, "parity"),
        announce=announcer(pytestconfig),
    )
