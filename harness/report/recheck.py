"""The verdicts' numbers once more, from the store's pairs: a report does not repeat what its runs contradict."""

from __future__ import annotations

import math

from forge.training.system.errors import DataError
from harness.measurement.results import TrialState
from harness.perf.claims import Claim, Verdict, judge
from harness.report.evidence import Evidence

_ROUNDING = 1e-6  # equal but for JSON and the order of sums


def recheck(verdict: Verdict, evidence: Evidence) -> bool:
    """Whether estimate and interval follow from the store's pairs. False where there is nothing to check.

    There is nothing to check without an estimate, or where the store no longer holds the trial as it was judged.
    Raises :class:`DataError` where the pairs give other numbers.
    """
    claim = Claim.model_validate(verdict.claim)
    trial = next((trial for trial in evidence.trials if trial.name == claim.trial), None)
    if verdict.estimate is None or trial is None or len(trial.pairs) != verdict.num_pairs:
        return False
    baseline = _values(trial, "baseline", claim.metric, evidence)
    candidate = _values(trial, "candidate", claim.metric, evidence)
    completed = ["completed"] * len(trial.pairs)
    again = judge(
        claim,
        baseline,
        candidate,
        num_pairs_planned=verdict.num_pairs_planned,
        baseline_statuses=completed,
        candidate_statuses=completed,
    )
    for name in ("estimate", "low", "high"):
        told, found = getattr(verdict, name), getattr(again, name)
        if not _equal(told, found):
            raise DataError(
                f"claim {claim.name}: {name} is {told} in the JSON and {found} by the store's {len(trial.pairs)} pairs",
                remedy="JSON and store are not of one gate: name those that belong together",
            )
    return True


def _equal(told: float | None, found: float | None) -> bool:
    if told is None or found is None:
        return told is found
    return math.isclose(told, found, rel_tol=_ROUNDING)


def _values(trial: TrialState, role: str, metric: str, evidence: Evidence) -> list[float]:
    values = []
    for pair in trial.pairs:
        run_id = str(getattr(pair, role))
        run = evidence.runs.get(run_id)
        value = run.measure(metric) if run else None
        if value is None:
            raise DataError(f"trial {trial.name}: pair {pair.index} names run {run_id}, which holds no {metric}")
        values.append(value)
    return values
