"""One session of killing runs: the tests of this folder ask for findings and record them."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.agenda import MODEL
from harness.hooks import announcer, gate_deadline
from harness.reliability.survival import Survival
from harness.store import Store


@pytest.fixture(scope="session")
def survival(pytestconfig: pytest.Config) -> Survival:
    """Left out of ``--gate-only`` (its name is "reliability"), nothing is run and what the store has is judged."""
    option = pytestconfig.getoption
    if not option("--gate-train"):
        raise pytest.UsageError("the gate trains on real documents: --gate-train FILE (README.md, section 'The gate')")
    only = tuple(filter(None, (option("--gate-only") or "").split(",")))
    return Survival(
        store=Store(option("--gate-store")),
        train=Path(option("--gate-train")).absolute(),
        model=option("--gate-model") or MODEL,
        deadline=gate_deadline(pytestconfig),
        measures=not only or "reliability" in only,
        announce=announcer(pytestconfig),
    )
