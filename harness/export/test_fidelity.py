"""Export fidelity on a trained base: each claim judged by what a probe answers, recorded, then asserted."""

from __future__ import annotations

from typing import Any

import pytest

from harness.export import suite
from harness.export.claims import CLAIMS, KINDS
from harness.export.exports import Exports
from harness.recorder import CLOCK, record_facts, record_metric
from harness.session import Session
from harness.verdict import Claim, Hold

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(0)]  # the first test waits for the run


@pytest.fixture(scope="session")
def exports(gate: Session) -> Exports:
    """Where ``--gate-only`` leaves "export" out, nothing is made: what the store has is judged."""
    session = gate.limited_to("export")
    return Exports(session, suite.judged_run(session), suite.timed_run(session))


@pytest.mark.benchmark(group="export", timer=CLOCK)
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_an_export_keeps_what_the_claim_says(exports: Exports, hold: Hold, claim: Claim) -> None:
    hold(exports.verdict(claim.name), **exports.entry)


@pytest.mark.benchmark(group="export: held-out loss", timer=CLOCK)
@pytest.mark.parametrize("subject", ["base", "adapter", "merged", *KINDS])
def test_the_held_out_loss_is_recorded(exports: Exports, benchmark: Any, subject: str) -> None:
    answer = exports.answer("divergence")
    assert answer is not None, f"INCOMPLETE: {exports.session.why_missing()}"
    step = next(step for step in answer["chain"] if step["subject"] == subject)
    samples = [step["nats_per_token"]]
    record_metric(benchmark, samples, metric="held_out_loss", unit="nats", arm=subject, step=step, **exports.entry)


@pytest.mark.benchmark(group="export: 7B, seconds", timer=CLOCK)
def test_the_whole_export_at_7b_is_timed(exports: Exports, benchmark: Any) -> None:
    assert exports.large is not None
    answer = exports.timing()
    if answer is None:
        reason = exports.session.why_missing()
        record_facts(benchmark, metric="none", record_kind="not_run", what="export at 7B", reason=reason)
        pytest.fail(f"INCOMPLETE: export at 7B: {reason}")
    record_metric(
        benchmark,
        [sum(float(step["seconds"]) for step in answer["steps"])],
        metric="export_seconds",
        unit="seconds",
        record_kind="export",
        workload=exports.large.workload,
        backend=exports.large.backend,
        arm="export at 7B",
        **{name: answer[name] for name in ("steps", "files", "needed_disk_bytes", "shape", "key")},
    )
    assert set(answer["files"]) == set(KINDS)
    assert not any(answer["fallbacks"].values()), answer["fallbacks"]
    assert all(step["peak_rss_bytes"] > 0 for step in answer["steps"])
