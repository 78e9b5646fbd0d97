"""A rung's verdict as an entry of the benchmark JSON, for what the report shows of it."""

from __future__ import annotations

from typing import Any

from harness.parity.ladder import WORKLOAD, Ladder
from harness.recorder import record_facts


def hold(ladder: Ladder, benchmark: Any, number: int) -> None:
    """Record the verdict on a rung, then assert it."""
    rung = ladder.verdict(number)
    record_facts(
        benchmark,
        metric=f"rung {number}",
        record_kind="parity",
        workload=WORKLOAD,
        arm=ladder.candidate,
        backend=ladder.candidate,
        baseline=ladder.baseline,
        run_ids=rung.run_ids,
        verdict=rung.to_dict(),
    )
    assert rung.status == "PASS", f"{rung.status}: rung {number} ({rung.name}): {rung.reason}"
