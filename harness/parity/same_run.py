"""What must be the same of two runs of the ladder: their work, and the learning rate of every step that was taken.

Rung 1 compares the optimizers and schedulers that the trainers hold before the first step; this is what became of them,
in every run of the rungs above.
"""

from __future__ import annotations

import math
from typing import Any

from harness.measurement.metrics import WorkMismatch, check_same_work, training_steps
from harness.measurement.results import Outcome

_RELATIVE = 1e-9  # schedules are computed in float64, by the same formula


def check_same_run(one: Outcome, other: Outcome) -> None:
    """Raise :class:`WorkMismatch` with both values where work or learning rates differ, or a step has none."""
    check_same_work(one, other)
    sides: list[list[Any]] = [[step.get("learning_rate") for step in training_steps(run)] for run in (one, other)]
    for number, (a, b) in enumerate(zip(*sides, strict=True), 1):
        if a is None or b is None or not math.isclose(a, b, rel_tol=_RELATIVE):
            raise WorkMismatch(
                f"not the same schedule: {one.spec.label()} [{one.run_id}] | {other.spec.label()} [{other.run_id}]\n"
                f"  learning_rate, step {number}: {a} | {b}",
                remedy="look at the optimizer's settings of both arms (rung 1 lists them)",
            )
