"""The session's exports: the tests of this folder take their verdicts and record them."""

from __future__ import annotations

import pytest

from harness.export.exports import Exports
from harness.export.suite import judged_run, timed_run
from harness.session import Session


@pytest.fixture(scope="session")
def exports(gate: Session) -> Exports:
    """Where ``--gate-only`` leaves "export" out, nothing is made: what the store has is judged."""
    session = gate.limited_to("export")
    return Exports(session, judged_run(session), timed_run(session))
