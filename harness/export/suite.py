"""What this suite measures: one run whose export is judged, one of 7B whose export is timed, and the probes."""

from __future__ import annotations

from typing import NamedTuple

from forge.training.backends import Backend
from harness.documents import write_documents
from harness.measurement.results import RunSpec
from harness.session import Session
from harness.trained_base import BASE, shared_folder, trained_base

BACKEND: Backend = "unsloth"
SEED = 42
NUM_DOCUMENTS = 32  # held out, for the divergences
MOST_TOKENS = 128  # of each: 152,064 logits per token of every model go through a file


class Seconds(NamedTuple):
    """``expected`` on a machine of sixteen cores: nothing is started that would not end in time."""

    limit: float
    expected: float


STEPS = {
    "train": Seconds(1200.0, 120.0),
    "export": Seconds(1200.0, 200.0),
    "export at 7B": Seconds(1800.0, 700.0),
    "evaluate": Seconds(600.0, 80.0),
}
PROBES = {
    "merge": Seconds(300.0, 40.0),
    "tokens": Seconds(300.0, 40.0),
    "provenance": Seconds(600.0, 80.0),
    "divergence": Seconds(1500.0, 240.0),
}


def judged_run(session: Session) -> RunSpec:
    """A run of the parity workload on the trained base, which is made now if need be.

    Where it is not made and nothing may be made, it is known by its name only: the store has nothing of such a run.
    Raises :class:`MachineError` where it cannot be made, :class:`DataError` for too few documents.
    """
    train, validation = write_documents(session.train, shared_folder(session.store))
    base = trained_base(BASE, session.store, measures=session.measures, announce=session.announce)
    data = (f"data.train={train}", f"data.validation={validation}")
    overrides = (f"model.path={base or BASE}", *data, f"training.seed={SEED}")
    return RunSpec(backend=BACKEND, workload="parity", overrides=overrides)


def timed_run(session: Session) -> RunSpec:
    """A short run of 7B."""
    overrides = (
        *(
            f"model.path={session.model}",
            f"data.train={session.train}",
            "data.validation=null",
            "data.validation_share=0",
            "data.sample=32",
        ),
        *("training.max_steps=4", "training.save_every_steps=null", "training.evaluate_every_steps=null"),
        "report_to=[]",
    )
    return RunSpec(backend=BACKEND, workload="legacy_256", overrides=overrides)
