"""One session of measuring before the tests of this folder: they record and judge, they do not measure."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.agenda import MODEL, ORDER
from harness.gate import Gate
from harness.hooks import announcer, gate_deadline
from harness.store import Store
from harness.worker import TIME_LIMIT_SECONDS


@pytest.fixture(scope="session")
def gate(pytestconfig: pytest.Config) -> Gate:
    """The gate, with everything measured that the time allowed."""
    option = pytestconfig.getoption
    if not option("--gate-train"):
        raise pytest.UsageError("the gate trains on real documents: --gate-train FILE (README.md, section 'The gate')")

    gate = Gate(
        store=Store(option("--gate-store")),
        train=Path(option("--gate-train")).absolute(),
        model=option("--gate-model") or MODEL,
        deadline=gate_deadline(pytestconfig),
        run_seconds=option("--gate-run-seconds") or TIME_LIMIT_SECONDS,
        may_halve=option("--gate-halves"),
        only=_only(option("--gate-only")),
        announce=announcer(pytestconfig),
    )
    gate.measure_all()
    return gate


def _only(told: str | None) -> tuple[str, ...]:
    """What ``--gate-only`` names of this folder; the rest are other folders."""
    if not told:
        return ORDER
    return tuple(name for name in filter(None, told.split(",")) if name not in ("parity", "export", "reliability"))
