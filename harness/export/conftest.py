"""The session's exports: tests of this folder ask for findings and record them."""

from __future__ import annotations

import pytest

from forge.training.system.errors import MachineError
from harness.export.exports import Exports
from harness.measurement.results import RunSpec, Store
from harness.parity.session import Ladder
from harness.parity.suite import CANDIDATE, WORKLOAD
from harness.pytest_plugin import announcer, gate_deadline, gate_documents, room_measures
from harness.session import MODEL

SEED = 42


@pytest.fixture(scope="session")
def exports(pytestconfig: pytest.Config) -> Exports:
    """The candidate's run of the parity workload, whose base is trained, and a short one of 7B's shape to be timed.

    Left out of ``--gate-only`` (its name is "export"), nothing is made and what the store has is judged.
    """
    option = pytestconfig.getoption
    measures = room_measures(pytestconfig, "export")
    store, train = Store(option("--gate-store")), gate_documents(pytestconfig)
    announce = announcer(pytestconfig)
    try:  # the ladder's base, documents and workload
        spec = Ladder(store=store, train=train, measures=measures, announce=announce).spec(CANDIDATE, SEED)
    except MachineError:
        if measures:
            raise
        spec = RunSpec(backend=CANDIDATE, workload=WORKLOAD)  # without its base nothing is found of the run
    large = (
        f"model.path={option('--gate-model') or MODEL}",
        f"data.train={train}",
        *("data.validation=null", "data.sample=32", "training.max_steps=4"),
        *("training.save_every_steps=null", "training.evaluate_every_steps=null", "report_to=[]"),
    )
    return Exports(
        store=store,
        spec=spec,
        large=RunSpec(backend=CANDIDATE, workload="legacy_256", overrides=large),
        deadline=gate_deadline(pytestconfig),
        measures=measures,
        announce=announce,
    )
