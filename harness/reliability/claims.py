"""What a run must survive: each claim with its statement, its bar and its judge, and the verdict on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from forge.training.backends import Backend
from forge.training.system.errors import ForgeError
from harness.reliability import suite
from harness.reliability.judge import Judged, judge_callbacks, judge_memory, judge_resume, judge_stop
from harness.session import Session
from harness.verdict import Verdict, by_faults, status_of_error

STOP_LIMIT_SECONDS = 30.0  # what torchrun's agent and Docker, at most, leave a process after SIGTERM


@dataclass(frozen=True)
class Claim:
    """``ask``: what measures it, or finds it in the store. ``judge`` is given the answer and the ``bars`` by name."""

    name: str
    statement: str
    ask: Callable[[Session, Backend], Any]
    judge: Callable[..., Judged]
    bars: Mapping[str, float] = field(default_factory=dict)


CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="resume",
        statement="A killed run and a stopped run resume as if nothing had happened.",
        ask=suite.small_run,
        judge=judge_resume,
    ),
    Claim(
        name="memory",
        statement="A step that runs out of memory is survived, the same work done.",
        ask=suite.tight_run,
        judge=judge_memory,
    ),
    Claim(
        name="callbacks",
        statement="The trainer's callbacks come in the order that saving relies on.",
        ask=suite.small_run,
        judge=judge_callbacks,
    ),
    Claim(
        name="stop",
        statement=f"At 7B a stopped run has sealed its checkpoint within {STOP_LIMIT_SECONDS:g} seconds.",
        ask=suite.large_run,
        judge=judge_stop,
        bars={"stop_seconds": STOP_LIMIT_SECONDS},
    ),
)


def verdict(session: Session, name: str, backend: Backend) -> Verdict:
    """The verdict on the claim ``name`` for a backend. ``figures``: the probe's answer, as answers.py describes it."""
    claim = next(claim for claim in CLAIMS if claim.name == name)
    figures: dict[str, Any] = {}
    try:
        answer = claim.ask(session, backend)
    except ForgeError as error:
        status, reason = status_of_error(error), str(error)
    else:
        if answer is None:
            status, reason = "INCOMPLETE", session.why_missing()
        else:
            figures = dict(answer)
            status, reason = by_faults(*claim.judge(answer, **claim.bars))
    return Verdict(
        name=f"{name}_{backend}",
        statement=f"{backend}: {claim.statement}",
        status=status,
        reason=reason,
        figures=figures,
    )
