"""One session of measuring before the tests of this folder: they record and judge."""

from __future__ import annotations

import pytest

from harness.perf.suite import PerfSuite
from harness.session import Session


@pytest.fixture(scope="session")
def perf(gate: Session) -> PerfSuite:
    """The suite, with everything measured that the time allowed."""
    suite = PerfSuite(gate)
    suite.measure_all()
    return suite
