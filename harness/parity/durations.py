"""How long a run of the ladder takes: the longest of its kind so far, else by the number of its micro-batches."""

from __future__ import annotations

from pathlib import Path

from forge.training.backends import load_plan
from forge.training.config.workload import load_workload
from harness.measurement.results import Outcome, RunSpec, Store
from harness.parity.suite import (
    EVALUATION_EXPECTED_SECONDS,
    MICRO_BATCH_EXPECTED_SECONDS,
    RUN_EXPECTED_SECONDS,
    WORKLOAD,
)


def micro_batch(spec: RunSpec) -> int:
    """Documents a micro-batch, by workload and plan."""
    return load_plan(load_workload(spec.workload, spec.overrides), spec.backend, spec.plan_overrides).micro_batch


class Durations:
    """Seconds by arm, micro-batch, and whether evaluated: of the store's runs, and of those noted since."""

    def __init__(self, store: Store) -> None:
        self._longest: dict[tuple[str, int, bool], float] = {}
        for outcome in store.outcomes():
            if Path(outcome.spec.workload).stem == WORKLOAD:
                self.note(outcome)

    def note(self, outcome: Outcome) -> None:
        """Take a run into account; one that left no record says nothing."""
        if outcome.record is not None and outcome.status == "completed":
            size = int(outcome.record["plan"].get("micro_batch", 1))
            kind = (outcome.spec.backend, size, outcome.spec.evaluate)
            self._longest[kind] = max(self._longest.get(kind, 0.0), outcome.wall_seconds)

    def expected_seconds(self, spec: RunSpec) -> float:
        """Of a run that has not been made."""
        size = micro_batch(spec)
        known = self._longest.get((spec.backend, size, spec.evaluate))
        if known is not None:
            return known
        training = load_workload(spec.workload, spec.overrides).training
        num_micro_batches = (training.max_steps or 0) * (training.effective_batch // size)
        seconds = RUN_EXPECTED_SECONDS + MICRO_BATCH_EXPECTED_SECONDS * num_micro_batches
        return seconds + EVALUATION_EXPECTED_SECONDS * spec.evaluate
