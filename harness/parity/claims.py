"""The claims of the parity ladder: the name and the statement of each rung, and every bar that it is judged by.

The judges import their bars from here. All bars were written down before the first measurement that they judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.stats import LOSS_MARGIN_NATS
from harness.verdict import Status, Verdict

NAMES = {1: "inputs", 2: "first step", 3: "step equivalence", 4: "noise", 5: "trajectory", 6: "outcome"}
STATEMENTS = {
    1: "Every arm trains the same numbers: ids, labels, weights, trainable parameters, settings.",
    2: "On one frozen batch the candidate's losses and gradients are as near to float32 as the baseline's.",
    3: "Any division of a step into micro-batches gives the same gradient; with Forge's layers, with dropout too.",
    4: "How far the baseline's own steps move when nothing but rounding changes is known.",
    5: "Over a whole run the candidate's steps stay within the baseline's own rounding.",
    6: "The candidate's adapters judge held-out documents as well as the baseline's, within the margin.",
}
ARCHITECTURE_STATEMENT = "Rungs 1 to 3 hold on a base of this architecture too."
PLAN_STATEMENT = "Rungs 1 to 3 hold in this plan too."

# --------------------------------------------------------------------------------------------------------------------
# Rungs 2 and 3: one step

MOST_ERROR = 1.5  # the candidate's error, as a multiple of the baseline's
LEAST_COSINE = 0.99  # of every gradient matrix with the float32 reference's
# How far other documents' losses may move when one document is replaced, as a multiple of what measuring the same twice
# moves. Where that is not zero, a replaced document adds as much again: the largest of some dozen such differences is
# not three times that of others. A leak is a hundred times it; where nothing varies the bar is 0.
MOST_UNSTEADINESS = 3.0
STEP_BARS = (MOST_ERROR, LEAST_COSINE, MOST_UNSTEADINESS)

# --------------------------------------------------------------------------------------------------------------------
# Rungs 4 and 5: a whole run

LEAST_STEPS = 100
LEAST_RUNS = 6  # different ones: with fewer, Student's limit is too wide to see anything
FALSE_ALARM = 0.02  # of a sound candidate, shared by four limits: peak and drift of two quantities
LIMIT_ALPHA = FALSE_ALARM / 4
LARGER_ROUNDING = MOST_ERROR  # what rung 2 lets pass must not fail here: the candidate's errors, times the baseline's
NUM_SMOOTHED_STEPS = 15  # the spread at a step is that of its neighbourhood: of one step it is known from n values only
SHARE_OF_ALL_STEPS = 0.25  # of a step's variance: at the first steps, before noise grows, layouts agree too well
MOST_PEAK = 2.0  # the limit of a peak, as a multiple of the largest that the baseline's runs show
FAULT = ("learning_rate", 1.1)  # of the optimizer: a fault that rung 5 must see to prove anything

# --------------------------------------------------------------------------------------------------------------------
# Rungs 5 and 6: the same schedule in every run

SAME_LEARNING_RATE = 1e-9  # relative: schedules are computed in float64, by the same formula

# --------------------------------------------------------------------------------------------------------------------
# Rung 6: held-out documents

MARGIN_NATS = LOSS_MARGIN_NATS
LEAST_SEEDS = 5
MOST_SEEDS = 20  # beyond it the spread is too large for the margin, and the workload wants changing
ALPHA = 0.05
POWER = 0.9  # of the test where there is no difference, if the spread is at its upper limit
PILOT_CONFIDENCE = 0.8  # of the upper limit that the spread of so few pilot seeds is given (Browne 1995)


class Unmeasured(Exception):
    """What a claim is judged from is missing. ``status`` and the message are the verdict then."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status: Status = status


def verdict_on(
    rung: int, status: Status, reason: str, figures: dict[str, Any] | None = None, run_ids: Sequence[str] = ()
) -> Verdict:
    """The verdict on a rung, 1 to 6. ``figures``: plain JSON of the rung's own; its number is added as ``rung``."""
    return Verdict(
        name=NAMES[rung],
        statement=STATEMENTS[rung],
        status=status,
        reason=reason,
        figures={"rung": rung, **(figures or {})},
        run_ids=list(run_ids),
    )


def verdict_on_architecture(
    model_type: str, status: Status, reason: str, figures: dict[str, Any] | None = None
) -> Verdict:
    """The verdict on rungs 1 to 3 with the ladder's base as a ``model_type``."""
    return Verdict(
        name=f"rungs 1 to 3 as {model_type}",
        statement=ARCHITECTURE_STATEMENT,
        status=status,
        reason=reason,
        figures=figures or {},
    )


def verdict_on_plan(name: str, status: Status, reason: str, figures: dict[str, Any] | None = None) -> Verdict:
    """The verdict on rungs 1 to 3 in the plan of ``suite.PLANS`` that has this name."""
    return Verdict(
        name=f"rungs 1 to 3, {name}", statement=PLAN_STATEMENT, status=status, reason=reason, figures=figures or {}
    )
