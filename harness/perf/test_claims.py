"""The acceptance table: each claim by its trial's pairs, green only if the worse end of the interval clears the bar."""

from __future__ import annotations

from typing import cast

import pytest

from harness.measurement.metrics import Metric
from harness.perf.claims import CLAIMS, Claim
from harness.perf.suite import METRICS, TRIALS, PerfSuite, describe_runs
from harness.recorder import CLOCK
from harness.verdict import Hold

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(0)]  # the first test waits for the measuring


def judge_and_hold(perf: PerfSuite, hold: Hold, claim: Claim) -> None:
    """Record the claim's verdict with the candidate's figures, then assert it."""
    verdict, planned = perf.verdict(claim), TRIALS[claim.trial]
    if not verdict.run_ids:
        hold(verdict, metric=claim.metric, record_kind="claim", workload=planned.workload)
        return
    trial = perf.trial(claim.trial)
    assert trial is not None
    candidates = [candidate for _, candidate in trial.pairs]
    samples = perf.samples(candidates, claim.metric, planned.workload)
    described = {**describe_runs(candidates, planned.candidate.name), "run_ids": verdict.run_ids}
    unit = METRICS[cast(Metric, claim.metric)]
    hold(verdict, metric=claim.metric, samples=samples, unit=unit, record_kind="claim", **described)


def _named(trial: str, *metrics: str) -> pytest.MarkDecorator:
    claims = [claim for claim in CLAIMS if claim.trial == trial and claim.metric in metrics]
    return pytest.mark.parametrize("claim", claims, ids=lambda claim: claim.name)


@pytest.mark.benchmark(group="claim: control", timer=CLOCK)
@_named("control_aa", "measured_seconds")
def test_legacy_measured_against_itself_shows_no_difference(perf: PerfSuite, hold: Hold, claim: Claim) -> None:
    judge_and_hold(perf, hold, claim)


@pytest.mark.benchmark(group="claim: speed", timer=CLOCK)
@_named("legacy_256", "measured_seconds")
def test_the_legacy_workload_is_at_least_twice_as_fast(perf: PerfSuite, hold: Hold, claim: Claim) -> None:
    judge_and_hold(perf, hold, claim)


@pytest.mark.benchmark(group="claim: speed", timer=CLOCK)
@_named("genome_full", "measured_seconds")
def test_whole_documents_are_at_least_twice_as_fast(perf: PerfSuite, hold: Hold, claim: Claim) -> None:
    judge_and_hold(perf, hold, claim)


@pytest.mark.benchmark(group="claim: memory", timer=CLOCK)
@_named("genome_full", "peak_allocated_bytes", "peak_reserved_bytes", "device_used_bytes")
def test_whole_documents_take_at_most_a_fifth_of_the_memory(perf: PerfSuite, hold: Hold, claim: Claim) -> None:
    judge_and_hold(perf, hold, claim)
