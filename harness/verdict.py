"""The verdict on a claim: one type for every suite, and one policy for what an accident means.

PASS: the claim was measured and holds. FAIL: it was measured and does not hold. INCONCLUSIVE: it was measured, and the
numbers do not decide. INCOMPLETE: it was not measured, or not in full.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from forge.training.system.errors import ForgeError
from harness.measurement.results import Outcome
from harness.measurement.results import Role as Role

Status = Literal["PASS", "FAIL", "INCONCLUSIVE", "INCOMPLETE"]
Hold = Callable[..., None]  # the fixture `hold` of conftest.py: records a verdict, then asserts it
Judged = tuple[Status, str, dict[str, Any]]  # what a judge makes of an answer: status, reason, figures for the report
STATUSES: tuple[Status, ...] = ("PASS", "INCOMPLETE", "INCONCLUSIVE", "FAIL")  # from best to worst

# Exit codes of an accident that says nothing about what is judged: arguments, environment (a GPU in use), disk, a lock,
# Ctrl-C and SIGTERM. Every other one is something found: a crash, bad data, memory, divergence, a failed check.
_SAYS_NOTHING = (2, 4, 6, 9, 130, 143)
# How a run ended that could not do the work. "refused" is missing here: a full disk says nothing about the run.
CANNOT_RUN = ("out_of_memory", "diverged", "timeout", "crashed", "no_record")


class Verdict(BaseModel):
    """What is known about one claim.

    ``name`` and ``statement``: the claim. ``reason``: one sentence with the numbers. ``figures``: plain JSON of the
    claim's own make, for the report. ``run_ids``: the runs in the store that it rests on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    statement: str
    status: Status
    reason: str
    figures: dict[str, Any] = Field(default_factory=dict)
    run_ids: list[str] = Field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, for an entry's ``verdict``."""
        return self.model_dump(mode="json")


@dataclass(frozen=True)
class Claim:
    """A claim about what one probe answers. ``probe``: which one, as the suite calls it.

    ``judge`` is given the answer and the ``bars`` by name.
    """

    name: str
    statement: str
    probe: str
    judge: Callable[..., Judged]
    bars: Mapping[str, float] = field(default_factory=dict)

    def verdict(self, answer: Any) -> Verdict:
        """The verdict on what the probe answers."""
        status, reason, figures = self.judge(answer, **self.bars)
        return Verdict(name=self.name, statement=self.statement, status=status, reason=reason, figures=figures)


def worst(statuses: Sequence[Status]) -> Status:
    """The worst of several statuses; INCOMPLETE of none."""
    return max(statuses, key=STATUSES.index, default="INCOMPLETE")


def by_faults(faults: Sequence[str], good: str) -> tuple[Status, str]:
    """Status and reason: PASS where there is no fault, and then ``good`` is the reason."""
    return ("FAIL", "; ".join(faults)) if faults else ("PASS", good)


def status_of_error(error: ForgeError, role: Role = "candidate") -> Status:
    """What an error means for the claim that it kept from being judged, by its exit code.

    An accident (GPU in use, full disk, lock, wrong arguments, Ctrl-C) says nothing: INCOMPLETE. Anything else was
    found: the candidate's is a FAIL, the baseline's leaves nothing to compare with, INCONCLUSIVE.
    """
    if error.exit_code in _SAYS_NOTHING:
        return "INCOMPLETE"
    return "FAIL" if role == "candidate" else "INCONCLUSIVE"


def status_of_run(outcome_status: str, role: Role) -> Status | None:
    """What the end of a run (``Outcome.status``) means for a claim; ``None`` where it completed.

    A candidate that cannot do the work has failed. A baseline that cannot leaves nothing to compare with. A run that
    was refused says nothing.
    """
    if outcome_status == "completed":
        return None
    if outcome_status not in CANNOT_RUN:
        return "INCOMPLETE"
    return "FAIL" if role == "candidate" else "INCONCLUSIVE"


def why_not_completed(outcome: Outcome, role: Role) -> str:
    """The reason that goes with :func:`status_of_run`."""
    why = f"{outcome.spec.label()} [{outcome.run_id}]: {outcome.status}"
    why += f": {outcome.message}" if outcome.message else ""
    return f"the {role} cannot run this: {why}" if outcome.status in CANNOT_RUN else why
