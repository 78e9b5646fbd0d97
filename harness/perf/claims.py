"""The acceptance table as data, and how measured pairs become a verdict on a claim.

A claim is a bar for a ratio. It passes only if the worse end of the 95% interval clears the bar, so
a claim that is not true passes a trial with a probability of at most 2.5% (twice that if a second
trial follows an INCONCLUSIVE one). The gate passes only if all claims do, so it is no more likely
to be wrong than one of them (an intersection-union test, Berger 1982: no correction for their
number is due). The A/A control errs the other way: sound arms fail it in 5% of trials.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from harness.measurement.results import RunStatus
from harness.stats import CONFIDENCE, Interval, pairs_needed, ratio_interval
from harness.verdict import CANNOT_RUN, Role, Status, Verdict, status_of_run

Direction = Literal["at_least", "at_most", "contains"]

POWER = 0.9  # what INCONCLUSIVE's number of pairs aims at
# Logarithms and back cost up to 1e-14 of a ratio, and one that is exactly the bar must not fall short of it.
_ROUNDING = 1e-12
_RUN_STATUSES: tuple[RunStatus, ...] = get_args(RunStatus)


class Claim(BaseModel):
    """One line of the acceptance table.

    ``trial`` and ``metric`` name what is measured (all metrics: lower is better). ``direction``:
    ``at_least`` is baseline / candidate whose interval must not reach below ``bar``; ``at_most``
    is candidate / baseline, not above it; ``contains`` is candidate / baseline of equal arms,
    whose interval must hold 1 and, where ``tolerance`` is given, lie within 1 / (1 + tolerance) and
    1 + tolerance: a control too noisy to see a difference of that size shows nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    statement: str
    trial: str
    metric: str
    direction: Direction
    bar: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    tolerance: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _control_is_at_one(self) -> Self:
        if self.direction == "contains" and self.bar != 1:
            raise ValueError(f"{self.name}: equal arms have the ratio 1, not {self.bar}")
        return self

    def is_cleared(self, low: float, high: float) -> bool:
        """Whether an interval for this claim's ratio lies on the right side of its bar."""
        least, most = self.bar * (1 - _ROUNDING), self.bar * (1 + _ROUNDING)
        holds = low <= most and high >= least and not self.is_too_wide(low, high)
        return {"at_least": low >= least, "at_most": high <= most, "contains": holds}[self.direction]

    def is_too_wide(self, low: float, high: float) -> bool:
        """Whether a control's interval reaches beyond its tolerance."""
        return self.tolerance is not None and (low < 1 / (1 + self.tolerance) or high > 1 + self.tolerance)

    def is_missed(self, low: float, high: float) -> bool:
        """Whether an interval lies wholly on the wrong side: even a lucky draw could not clear the bar."""
        if self.is_cleared(low, high):
            return False
        outside = low > self.bar * (1 + _ROUNDING) or high < self.bar * (1 - _ROUNDING)
        return {"at_least": high < self.bar, "at_most": low > self.bar, "contains": outside}[self.direction]


def _memory(name: str, metric: str, what: str) -> Claim:
    statement = f"Training on whole documents takes at most a fifth of legacy's {what}."
    return Claim(name=name, statement=statement, trial="genome_full", metric=metric, direction="at_most", bar=0.20)


CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="legacy_256_speed",
        statement="Training on the legacy workload is at least twice as fast as with legacy.",
        trial="legacy_256",
        metric="measured_seconds",
        direction="at_least",
        bar=2.0,
    ),
    Claim(
        name="genome_full_speed",
        statement="Training on whole documents is at least twice as fast as with legacy.",
        trial="genome_full",
        metric="measured_seconds",
        direction="at_least",
        bar=2.0,
    ),
    _memory("genome_full_peak_allocated", "peak_allocated_bytes", "peak of allocated GPU memory"),
    _memory("genome_full_peak_reserved", "peak_reserved_bytes", "peak of reserved GPU memory"),
    _memory("genome_full_device_used", "device_used_bytes", "GPU memory in use as the driver counts it"),
    Claim(
        name="control_aa",
        statement="legacy measured against itself shows no difference, and one of a fifth would show.",
        trial="control_aa",
        metric="measured_seconds",
        direction="contains",
        bar=1.0,
        tolerance=0.2,
    ),
)


def judge(
    claim: Claim,
    baseline_values: Sequence[float],
    candidate_values: Sequence[float],
    *,
    num_pairs_planned: int,
    baseline_statuses: Sequence[str],
    candidate_statuses: Sequence[str],
    run_ids: Sequence[str] = (),
) -> Verdict:
    """The verdict on a claim from the complete pairs of its trial.

    ``*_values``: the claim's metric, shape (complete pairs,), in the order of the pairs.
    ``*_statuses``: how every run of that arm ended (``Outcome.status``), those of broken or
    repeated pairs included. A candidate that cannot run has failed; a baseline that cannot leaves
    nothing to compare with. ``ValueError``: more pairs than planned (n is fixed beforehand), arms
    of unequal length, more values than completed runs, an unknown status.

    The verdict's ``figures``: ``claim`` as JSON; ``estimate``, ``low``, ``high``: the claim's ratio and
    its 95% interval, None where there is none; ``num_pairs``, ``num_pairs_planned``; ``pairs_needed``
    (INCONCLUSIVE only, None where unknown): the further pairs that would decide with probability 0.9
    if ratio and noise are as seen here: those of one new trial, judged by itself. Adding them to the
    old pairs and judging again would pass too often.
    """
    num_pairs = len(baseline_values)
    if num_pairs != len(candidate_values):
        raise ValueError(f"{num_pairs} baseline values for {len(candidate_values)} of the candidate")
    ends: dict[Role, Sequence[str]] = {"candidate": candidate_statuses, "baseline": baseline_statuses}
    for statuses in ends.values():
        if unknown := sorted(set(statuses) - set(_RUN_STATUSES)):
            raise ValueError(f"unknown status {unknown[0]!r}; known: {', '.join(_RUN_STATUSES)}")
        if (completed := statuses.count("completed")) < num_pairs:
            raise ValueError(f"{num_pairs} values from {completed} completed runs")
    if num_pairs_planned < 1 or num_pairs > num_pairs_planned:
        raise ValueError(f"{claim.name}: {num_pairs} pairs where {num_pairs_planned} were planned")

    def verdict(status: Status, reason: str, interval: Interval | None = None, further: int | None = None) -> Verdict:
        values = (interval.estimate, interval.low, interval.high) if interval else (0.0, 0.0, 0.0)
        estimate, low, high = (value if 0 < value < math.inf else None for value in values)
        figures = {
            "claim": claim.model_dump(mode="json"),
            "estimate": estimate,
            "low": low,
            "high": high,
            "num_pairs": num_pairs,
            "num_pairs_planned": num_pairs_planned,
            "pairs_needed": further,
        }
        return Verdict(
            name=claim.name,
            statement=claim.statement,
            status=status,
            reason=reason,
            figures=figures,
            run_ids=list(run_ids),
        )

    for role, statuses in ends.items():
        broken = next((status for status in statuses if status in CANNOT_RUN), None)
        if broken and (meaning := status_of_run(broken, role)):
            return verdict(meaning, f"the {role} cannot run this: {broken}")
    arms = (baseline_values, candidate_values) if claim.direction == "at_least" else (candidate_values, baseline_values)
    interval = ratio_interval(*arms, confidence=CONFIDENCE) if num_pairs else None
    if interval is None or num_pairs < num_pairs_planned:
        is_refused = any(status != "completed" for statuses in ends.values() for status in statuses)
        why = "; a run was refused before or while it measured" if is_refused else ""
        return verdict("INCOMPLETE", f"{num_pairs} of {num_pairs_planned} pairs measured{why}", interval)
    if interval.log_sd is None:
        return verdict("INCONCLUSIVE", "one pair shows no noise, so there is no interval", interval)
    if claim.is_cleared(interval.low, interval.high):
        return verdict("PASS", _describe(claim, interval, "clears"), interval)
    if claim.is_missed(interval.low, interval.high):
        return verdict("FAIL", _describe(claim, interval, "misses"), interval)
    if claim.direction == "contains":
        return verdict("INCONCLUSIVE", _describe(claim, interval, "is too wide to exclude"), interval)
    further = pairs_needed(interval.log_sd, math.log(interval.estimate / claim.bar), CONFIDENCE, POWER)
    decides = f"a new trial of {further} pairs, judged by itself, would probably decide"
    advice = decides if further else "no number of pairs helps"
    return verdict("INCONCLUSIVE", f"{_describe(claim, interval, 'straddles')}; {advice}", interval, further)


def _describe(claim: Claim, interval: Interval, does: str) -> str:
    low, high, bar = interval.low, interval.high, claim.bar
    ends = f"the interval {_show(low, bar)} to {_show(high, bar)}"
    if claim.direction != "contains":
        text = f"{ends} {does} the bar of {claim.direction.replace('_', ' ')} {bar:g}"
    elif does == "is too wide to exclude":
        text = f"{ends} {does} a bias of {claim.tolerance:.0%}: measure on a quieter machine"
    elif does == "clears":
        text = f"{ends} holds 1; what lies outside it is excluded, what lies inside is this control's noise"
    else:
        text = f"{ends} does not hold 1: the measurement is biased, or this is the one sound trial in twenty"
    return text + ("; the pairs do not vary, so it is a point" if high - low < _ROUNDING * high else "")


def _show(value: float, bar: float) -> str:
    """Four digits, or as many as it takes that a value beside the bar is not printed as the bar."""
    return next(
        text for digits in (4, 6, 9, 17) if float(text := f"{value:.{digits}g}") != bar or value == bar or digits == 17
    )
