"""Runs that are killed, stopped or short of memory, by both backends: each claim judged, recorded, then asserted."""

from __future__ import annotations

import pytest

from forge.training.backends import Backend
from harness.recorder import CLOCK
from harness.reliability.claims import verdict
from harness.reliability.suite import BACKENDS
from harness.session import Session
from harness.verdict import Hold

pytestmark = [
    *(pytest.mark.gpu, pytest.mark.timeout(0), pytest.mark.parametrize("backend", BACKENDS)),
    pytest.mark.benchmark(group="reliability", timer=CLOCK),
]


def hold_claim(session: Session, hold: Hold, name: str, backend: Backend) -> None:
    """Record the verdict on a claim, with the key of the probe that it traces to in the store; then assert it."""
    judged = verdict(session, name, backend)
    probe = {"probe": judged.figures["key"]} if judged.figures else {}
    hold(judged, record_kind="reliability", backend=backend, **probe)


def test_killed_and_stopped_runs_resume_as_if_nothing_had_happened(
    session: Session, hold: Hold, backend: Backend
) -> None:
    hold_claim(session, hold, "resume", backend)


def test_a_step_that_runs_out_of_memory_is_survived(session: Session, hold: Hold, backend: Backend) -> None:
    hold_claim(session, hold, "memory", backend)


def test_the_callbacks_of_the_training_loop_come_in_order(session: Session, hold: Hold, backend: Backend) -> None:
    hold_claim(session, hold, "callbacks", backend)


def test_a_stop_at_7b_has_sealed_its_checkpoint_in_time(session: Session, hold: Hold, backend: Backend) -> None:
    hold_claim(session, hold, "stop", backend)
