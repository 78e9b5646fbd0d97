"""The acceptance table: each claim by its trial's pairs, green only if the worse end of the interval clears the bar."""

from __future__ import annotations

from typing import Any, cast

import pytest

from harness.measurement.metrics import Metric
from harness.measurement.trial import measure
from harness.perf.claims import CLAIMS, Claim
from harness.perf.entries import METRICS, identity
from harness.perf.session import Gate
from harness.perf.suite import TRIALS
from harness.recorder import CLOCK, record_facts, record_metric

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(0)]  # the first test waits for the measuring


def hold(gate: Gate, benchmark: Any, claim: Claim) -> None:
    """Record the claim's verdict with the candidate's figures, then assert it."""
    trial, verdict = gate.trial(claim.trial), gate.verdict(claim)
    metric = cast(Metric, claim.metric)
    planned = TRIALS[claim.trial]
    extra: dict[str, Any] = {"record_kind": "claim", "verdict": verdict.to_dict()}
    if trial is not None and trial.pairs:
        candidates = [candidate for _, candidate in trial.pairs]
        warmup = gate.num_warmup_steps(planned.workload)
        samples = [measure(outcome, metric, num_warmup_steps=warmup) for outcome in candidates]
        known = {**identity(candidates, planned.candidate.name), **extra}
        known["run_ids"] = [outcome.run_id for pair in trial.pairs for outcome in pair]
        record_metric(benchmark, samples, metric=metric, unit=METRICS[metric], **known)
    else:
        record_facts(benchmark, metric=metric, workload=planned.workload, **extra)
    why = f" ({trial.stopped})" if trial is not None and trial.stopped else ""
    assert verdict.status == "PASS", f"{verdict.status}: {claim.statement} {verdict.reason}{why}"


def _named(trial: str, *metrics: str) -> pytest.MarkDecorator:
    found = [claim for claim in CLAIMS if claim.trial == trial and claim.metric in metrics]
    return pytest.mark.parametrize("claim", found, ids=lambda claim: claim.name)


@pytest.mark.benchmark(group="claim: control", timer=CLOCK)
@_named("control_aa", "measured_seconds")
def test_the_legacy_stack_measured_against_itself_shows_no_difference(gate: Gate, benchmark: Any, claim: Claim) -> None:
    hold(gate, benchmark, claim)


@pytest.mark.benchmark(group="claim: speed", timer=CLOCK)
@_named("legacy_256", "measured_seconds")
def test_the_owners_work_is_at_least_twice_as_fast(gate: Gate, benchmark: Any, claim: Claim) -> None:
    hold(gate, benchmark, claim)


@pytest.mark.benchmark(group="claim: speed", timer=CLOCK)
@_named("genome_full", "measured_seconds")
def test_whole_documents_are_at_least_twice_as_fast(gate: Gate, benchmark: Any, claim: Claim) -> None:
    hold(gate, benchmark, claim)


@pytest.mark.benchmark(group="claim: memory", timer=CLOCK)
@_named("genome_full", "peak_allocated_bytes", "peak_reserved_bytes", "device_used_bytes")
def test_whole_documents_take_at_most_a_fifth_of_the_memory(gate: Gate, benchmark: Any, claim: Claim) -> None:
    hold(gate, benchmark, claim)
