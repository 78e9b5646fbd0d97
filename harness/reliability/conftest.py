"""The session as this suite sees it."""

from __future__ import annotations

import pytest

from harness.session import Session


@pytest.fixture(scope="session")
def session(gate: Session) -> Session:
    """Where ``--gate-only`` leaves "reliability" out, nothing is run: what the store has is judged."""
    return gate.limited_to("reliability")
