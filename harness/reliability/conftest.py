"""One session of killing runs: the tests of this folder ask for findings and record them."""

from __future__ import annotations

import pytest

from harness.measurement.results import Store
from harness.pytest_plugin import announcer, gate_deadline, gate_documents, room_measures
from harness.reliability.claims import Survival
from harness.session import MODEL


@pytest.fixture(scope="session")
def survival(pytestconfig: pytest.Config) -> Survival:
    """Left out of ``--gate-only`` (its name is "reliability"), nothing is run and what the store has is judged."""
    option = pytestconfig.getoption
    return Survival(
        store=Store(option("--gate-store")),
        train=gate_documents(pytestconfig),
        model=option("--gate-model") or MODEL,
        deadline=gate_deadline(pytestconfig),
        measures=room_measures(pytestconfig, "reliability"),
        announce=announcer(pytestconfig),
    )
