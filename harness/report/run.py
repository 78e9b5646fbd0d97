"""One run of the store, as far as a report needs it: what it was, how it ended, what it measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast, get_args

from pydantic import ValidationError

from forge.training.checks.machine import memory_floor_bytes
from forge.training.config.workload import Workload
from forge.training.system.errors import CheckError, DataError
from forge.training.train.record import RunRecord
from harness.measurement.metrics import Metric, measure, training_steps
from harness.measurement.results import Outcome

_RATES = {"documents_per_second": "documents", "tokens_per_second": "tokens"}


@dataclass(frozen=True)
class Run:
    """``record`` is None where the process left none. ``steps``: the optimizer steps, warm-up included.

    Measured are the steps after the workload's ``gate.num_warmup_steps``. What cannot be known is None.
    """

    outcome: Outcome
    record: RunRecord | None
    steps: tuple[dict[str, Any], ...]

    @property
    def id(self) -> str:
        return self.outcome.run_id

    @property
    def status(self) -> str:
        return self.outcome.status

    @property
    def backend(self) -> str:
        return self.outcome.spec.backend

    @property
    def is_complete(self) -> bool:
        return self.status == "completed" and self.record is not None

    @property
    def num_warmup_steps(self) -> int:
        if self.record is None:
            return 0
        gate = self.record.workload.get("gate") or {}
        return int(gate.get("num_warmup_steps", self.record.timing.num_warmup_steps_left_out))

    @property
    def measured_steps(self) -> tuple[dict[str, Any], ...]:
        return self.steps[self.num_warmup_steps :]

    @property
    def documents(self) -> int:
        return sum(step["documents"] for step in self.measured_steps)

    @property
    def tokens(self) -> int:
        return sum(step["tokens"] for step in self.measured_steps)

    def measure(self, metric: str) -> float | None:
        """A metric of the gate, documents or tokens a second; None where this run did not measure it."""
        if not self.is_complete:
            return None
        if metric in _RATES:
            seconds = self.measure("measured_seconds")
            return getattr(self, _RATES[metric]) / seconds if seconds else None
        if metric not in get_args(Metric):
            return None
        try:
            return measure(self.outcome, cast(Metric, metric), num_warmup_steps=self.num_warmup_steps)
        except CheckError:
            return None

    def peak_by_phase(self) -> dict[str, float]:
        """The peak allocated by the end of each phase, bytes."""
        phases = self.record.memory if self.record and self.is_complete else []
        return {phase.phase: float(phase.peak_allocated_bytes) for phase in phases}

    @cached_property
    def floor_bytes(self) -> int | None:
        """What weights, adapter and optimizer state need whatever the plan; None without the model's sizes."""
        if self.record is None or self.record.model_shape is None:
            return None
        try:
            return memory_floor_bytes(Workload.model_validate(self.record.workload), self.record.model_shape)
        except (ValidationError, KeyError, TypeError):  # a record of another schema: no floor is better than a guess
            return None

    @property
    def commit(self) -> str | None:
        git = self.record.environment.get("git") if self.record else None
        return f"{git['commit'][:10]}{' (changed)' if git.get('is_dirty') else ''}" if git else None

    @property
    def layout(self) -> str:
        """The plan as people write it: ``4 x 2, no padding, flash``."""
        if self.record is None:
            return "not known"
        plan, training = self.record.plan, self.record.workload.get("training") or {}
        size = int(plan.get("micro_batch") or 1)
        words = [f"{size} x {int(training.get('effective_batch') or size) // size}"]
        words += ["no padding"] if plan.get("padding") == "none" else []
        words += [f"grouped by {plan['grouping']}"] if plan.get("grouping") not in (None, "none") else []
        words += [f"{plan['attention']} attention"] if plan.get("attention") not in (None, "default") else []
        words += [f"checkpointing {plan['gradient_checkpointing']}"] if plan.get("gradient_checkpointing") else []
        words += [f"MLP in tiles of {plan['mlp_tile_tokens']:,}"] if plan.get("mlp_tile_tokens") else []
        words += [f"loss in chunks of {plan['loss_chunk_gib']:g} GiB"] if plan.get("loss_chunk_gib") else []
        return ", ".join(words)


def read_run(outcome: Outcome) -> Run:
    """Raises :class:`DataError` where the outcome's record is none of this version."""
    try:
        record = None if outcome.record is None else RunRecord.model_validate(outcome.record)
    except ValidationError as invalid:
        first = invalid.errors()[0]
        where = ".".join(("record", *map(str, first["loc"])))
        raise DataError(
            f"run {outcome.run_id} holds a record this version cannot read: {where}: {first['msg']}"
        ) from None
    return Run(outcome, record, tuple(training_steps(outcome)))
