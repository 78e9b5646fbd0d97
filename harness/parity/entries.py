"""A verdict of the ladder as an entry of the benchmark JSON, for what the report shows of it."""

from __future__ import annotations

from typing import Any

from harness.parity.session import Ladder
from harness.parity.suite import WORKLOAD
from harness.recorder import record_facts


def hold(ladder: Ladder, benchmark: Any, number: int) -> None:
    """Record the verdict on a rung, then assert it."""
    rung = ladder.verdict(number)
    record(ladder, benchmark, f"rung {number}", rung.to_dict(), rung.run_ids)
    assert rung.status == "PASS", f"{rung.status}: rung {number} ({rung.name}): {rung.reason}"


def record(ladder: Ladder, benchmark: Any, metric: str, verdict: dict[str, Any], run_ids: list[str]) -> None:
    """Record a verdict: of a rung, or beside them."""
    record_facts(
        benchmark,
        metric=metric,
        record_kind="parity",
        workload=WORKLOAD,
        arm=ladder.candidate,
        backend=ladder.candidate,
        baseline=ladder.baseline,
        run_ids=run_ids,
        verdict=verdict,
    )
