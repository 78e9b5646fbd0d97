"""From a gate's runs to pytest-benchmark entries: what every entry of this folder says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.measurement.metrics import Metric
from harness.measurement.results import Outcome
from harness.measurement.trial import measure
from harness.recorder import Unit, record_metric

METRICS: dict[Metric, Unit] = {
    "measured_seconds": "seconds",
    "peak_allocated_bytes": "bytes",
    "peak_reserved_bytes": "bytes",
    "device_used_bytes": "bytes",
    "last_train_loss": "nats",
}


def identity(outcomes: Sequence[Outcome], arm: str) -> dict[str, Any]:
    """The work and the layout that these runs share."""
    first = outcomes[0]
    record = first.record or {}
    return {
        "workload": (record.get("workload") or {}).get("name") or first.spec.workload,
        "workload_sha256": record.get("workload_sha256"),
        "backend": first.spec.backend,
        "arm": arm,
        "plan": record.get("plan") or first.key_parts.get("plan"),
        "code_sha256": first.key_parts.get("code"),
        "gpu": first.key_parts.get("gpu"),
        "run_ids": [outcome.run_id for outcome in outcomes],
    }


def record_runs(
    benchmark: Any, outcomes: Sequence[Outcome], arm: str, metric: Metric, num_warmup_steps: int, **extra: Any
) -> None:
    """One entry: a metric of an arm's runs, a sample a run."""
    samples = [measure(outcome, metric, num_warmup_steps=num_warmup_steps) for outcome in outcomes]
    record_metric(benchmark, samples, metric=metric, unit=METRICS[metric], **identity(outcomes, arm), **extra)
