"""The session's exports: tests of this folder ask for findings and record them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from harness.agenda import MODEL
from harness.export.exports import Exports
from harness.hooks import gate_deadline
from harness.parity.ladder import CANDIDATE, Ladder
from harness.store import RunSpec, Store

SEED = 42


@pytest.fixture(scope="session")
def exports(pytestconfig: pytest.Config) -> Exports:
    """The candidate's run of the parity workload, whose base is trained, and a short one of 7B's shape to be timed.

    Left out of ``--gate-only`` (its name is "export"), nothing is made and what the store has is judged.
    """
    option = pytestconfig.getoption
    if not option("--gate-train"):
        raise pytest.UsageError("the gate trains on real documents: --gate-train FILE (README.md, section 'The gate')")
    only = tuple(filter(None, (option("--gate-only") or "").split(",")))
    store, train = Store(option("--gate-store")), Path(option("--gate-train")).absolute()

    def announce(line: str) -> None:
        print(line, file=sys.__stderr__, flush=True)

    ladder = Ladder(store=store, train=train, announce=announce)  # the same base, documents and workload
    large = (
        f"model.path={option('--gate-model') or MODEL}",
        f"data.train={train}",
        *("data.validation=null", "data.sample=32", "training.max_steps=4"),
        *("training.save_every_steps=null", "training.evaluate_every_steps=null", "report_to=[]"),
    )
    return Exports(
        store=store,
        spec=ladder.spec(CANDIDATE, SEED),
        large=RunSpec(backend=CANDIDATE, workload="legacy_256", overrides=large),
        deadline=gate_deadline(pytestconfig),
        measures=not only or "export" in only,
        announce=announce,
    )
