"""Runs that are killed, stopped or short of memory, by both backends: each claim judged, recorded, then asserted."""

from __future__ import annotations

import pytest

from forge.training.backends import Backend
from harness.recorder import CLOCK
from harness.reliability.claims import CLAIMS
from harness.reliability.suite import BACKENDS, verdict
from harness.session import Session
from harness.verdict import Claim, Hold


@pytest.fixture(scope="session")
def session(gate: Session) -> Session:
    """Where ``--gate-only`` leaves "reliability" out, nothing is run: what the store has is judged."""
    return gate.limited_to("reliability")


@pytest.mark.gpu
@pytest.mark.timeout(0)
@pytest.mark.benchmark(group="reliability", timer=CLOCK)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_a_run_survives_what_the_claim_says(session: Session, hold: Hold, claim: Claim, backend: Backend) -> None:
    judged = verdict(session, claim, backend)
    probe = {"probe": judged.figures["key"]} if judged.figures else {}  # the key of its answer in the store
    hold(judged, record_kind="reliability", backend=backend, **probe)
