"""Runs that are killed, stopped or short of memory, by both stacks: each claim judged, recorded, then asserted."""

from __future__ import annotations

from typing import Any

import pytest

from forge.training.backends import Backend
from harness.recorder import CLOCK, record_facts
from harness.reliability.claims import BACKENDS, Survival

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(0), pytest.mark.parametrize("backend", BACKENDS)]


def hold(survival: Survival, benchmark: Any, name: str, backend: Backend) -> None:
    """Record the finding on a claim, then assert it."""
    finding = survival.finding(name, backend)
    verdict = finding.to_dict()
    probe = {"probe": finding.figures["key"]} if finding.figures else {}  # what it traces to in the store
    record_facts(benchmark, metric=finding.name, record_kind="reliability", backend=backend, verdict=verdict, **probe)
    assert finding.status == "PASS", f"{finding.status}: {finding.statement} {finding.reason}"


@pytest.mark.benchmark(group="reliability", timer=CLOCK)
def test_killed_and_stopped_runs_go_on_as_if_nothing_had_happened(
    survival: Survival, benchmark: Any, backend: Backend
) -> None:
    hold(survival, benchmark, "resume", backend)


@pytest.mark.benchmark(group="reliability", timer=CLOCK)
def test_a_step_that_runs_out_of_memory_is_survived(survival: Survival, benchmark: Any, backend: Backend) -> None:
    hold(survival, benchmark, "memory", backend)


@pytest.mark.benchmark(group="reliability", timer=CLOCK)
def test_the_callbacks_of_the_training_loop_come_in_order(survival: Survival, benchmark: Any, backend: Backend) -> None:
    hold(survival, benchmark, "callbacks", backend)


@pytest.mark.benchmark(group="reliability", timer=CLOCK)
def test_a_stop_at_7b_has_sealed_its_checkpoint_in_time(survival: Survival, benchmark: Any, backend: Backend) -> None:
    hold(survival, benchmark, "stop", backend)
