"""The verdict on a rung of the parity ladder, in the words of the acceptance table."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from harness.measurement.results import Outcome
from harness.perf.claims import Status

NAMES = {1: "inputs", 2: "first step", 3: "step equivalence", 4: "noise", 5: "trajectory", 6: "outcome"}
STATEMENTS = {
    1: "Every arm trains the same numbers: ids, labels, weights, trainable parameters, settings.",
    2: "On one frozen batch the candidate's losses and gradients are as near to float32 as the baseline's.",
    3: "Any division of a step into micro-batches gives the same gradient.",
    4: "How far the baseline's own steps move when nothing but rounding changes is known.",
    5: "Over a whole run the candidate's steps stay within the baseline's own rounding.",
    6: "The candidate's adapters judge held-out documents as well as the baseline's, within the margin.",
}

_CANNOT_RUN = ("out_of_memory", "diverged", "timeout", "crashed", "no_record")  # the run's own fault


class Rung(BaseModel):
    """What was found on a rung. ``figures`` is plain JSON, of the rung's own make: what a report shows of it.

    PASS, FAIL and INCONCLUSIVE as for claims; INCOMPLETE: not measured, or the rung below is no PASS.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    number: Annotated[int, Field(ge=1, le=6)]
    status: Status
    reason: str
    figures: dict[str, Any] = Field(default_factory=dict)
    run_ids: list[str] = Field(default_factory=list)

    @property
    def name(self) -> str:
        """The rung's name, as in :data:`NAMES`."""
        return NAMES[self.number]

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, with name and statement, for an entry's ``verdict``."""
        words = {"name": self.name, "statement": STATEMENTS[self.number]}
        return {"number": self.number, **words, **self.model_dump(mode="json", exclude={"number"})}


def blocked_by(below: Rung, number: int) -> Rung:
    """The verdict on rung ``number`` where ``below``, the lowest that was missed, did not pass."""
    why = f"rung {below.number} ({below.name}) is {below.status}, and each rung stands on those below"
    return Rung(number=number, status="INCOMPLETE", reason=f"{why}: {below.reason}")


def not_completed(number: int, outcome: Outcome, role: str, run_ids: list[str]) -> Rung:
    """What a run that did not complete means: for the candidate failure, for the baseline nothing to compare with."""
    why = f"{outcome.spec.label()} [{outcome.run_id}]: {outcome.status}" + (
        f": {outcome.message}" if outcome.message else ""
    )
    if outcome.status not in _CANNOT_RUN:
        return Rung(number=number, status="INCOMPLETE", reason=why, run_ids=run_ids)
    if role == "candidate":
        return Rung(number=number, status="FAIL", reason=f"the candidate cannot run this: {why}", run_ids=run_ids)
    reason = f"the baseline cannot run this: {why}"
    return Rung(number=number, status="INCONCLUSIVE", reason=reason, run_ids=run_ids)
