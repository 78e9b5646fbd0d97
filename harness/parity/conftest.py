"""The session's ladder: tests of this folder ask it for verdicts and record them."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.hooks import announcer, gate_deadline
from harness.parity.ladder import Ladder
from harness.store import Store


@pytest.fixture(scope="session")
def ladder(pytestconfig: pytest.Config) -> Ladder:
    """The parity ladder. Left out of ``--gate-only``, it measures nothing and judges what the store has."""
    option = pytestconfig.getoption
    if not option("--gate-train"):
        raise pytest.UsageError("the gate trains on real documents: --gate-train FILE (README.md, section 'The gate')")
    only = tuple(filter(None, (option("--gate-only") or "").split(",")))

    return Ladder(
        store=Store(option("--gate-store")),
        train=Path(option("--gate-train")).absolute(),
        deadline=gate_deadline(pytestconfig),
        measures=not only or "parity" in only,
        announce=announcer(pytestconfig),
    )
