"""The session's ladder: tests of this folder ask for its verdicts and record them."""

from __future__ import annotations

import pytest

from harness.parity.session import Ladder
from harness.session import Session


@pytest.fixture(scope="session")
def ladder(gate: Session) -> Ladder:
    """The parity ladder. Where ``--gate-only`` leaves it out, it measures nothing and judges what the store has."""
    return Ladder(gate.limited_to("parity"))
