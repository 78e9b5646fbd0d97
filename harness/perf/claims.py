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
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from harness import verdict
from harness.stats import Interval, pairs_needed, ratio_interval

Status = Literal["PASS", "FAIL", "INCONCLUSIVE", "INCOMPLETE"]
Direction = Literal["at_least", "at_most", "contains"]

CONFIDENCE = 0.95
POWER = 0.9  # what INCONCLUSIVE's number of pairs aims at
# Logarithms and back cost up to 1e-14 of a ratio, and one that is exactly the bar must not fall short of it.
_ROUNDING = 1e-12
_CANNOT_RUN = ("out_of_memory", "diverged", "timeout", "crashed", "no_record")
_NOT_RUN = ("refused",)  # disk full, another process on the GPU: says nothing about the arm
_RUN_STATUSES = ("completed", *_CANNOT_RUN, *_NOT_RUN)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Claim(_Part):
    """One line of the acceptance table.

    ``trial`` and ``metric`` name what is measured (all metrics: lower is better). ``direction``:
    ``at_least`` is baseline / candidate whose interval must not reach below ``bar``; ``at_most``
    is candidate / baseline, not above it; ``contains`` is candidate / baseline of equal arms,
    whose interval must hold 1 and, where ``tolerance`` is given, lie within 1 / (1 + tolerance) and
    1 + tolerance: a control too noisy to see a difference of that size shows nothing.
    """

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
        """Whether an interval lies wholly on the wrong side: no luck with the noise would clear the bar."""
        if self.is_cleared(low, high):
            return False
        outside = low > self.bar * (1 + _ROUNDING) or high < self.bar * (1 - _ROUNDING)
        return {"at_least": high < self.bar, "at_most": low > self.bar, "contains": outside}[self.direction]


def _memory(name: str, metric: str, what: str) -> Claim:
    statement = f"Training on whole documents takes at most a fifth of the legacy stack's {what}."
    return Claim(name=name, statement=statement, trial="genome_full", metric=metric, direction="at_most", bar=0.20)


CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="legacy_256_speed",
        statement="Training on the legacy workload is at least twice as fast as with the legacy stack.",
        trial="legacy_256",
        metric="measured_seconds",
        direction="at_least",
        bar=2.0,
    ),
    Claim(
        name="genome_full_speed",
        statement="Training on whole documents is at least twice as fast as with the legacy stack.",
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
        statement="The legacy stack measured against itself shows no difference, and one of a fifth would show.",
        trial="control_aa",
        metric="measured_seconds",
        direction="contains",
        bar=1.0,
        tolerance=0.2,
    ),
)


class Verdict(verdict.Verdict):
    """What the pairs say about a claim. ``to_dict`` and back loses nothing and holds no inf or NaN.

    ``low``, ``high``: the 95% interval of the claim's ratio, None where there is none.
    ``pairs_needed`` (INCONCLUSIVE only, None where unknown): the further pairs that would decide
    with probability 0.9 if ratio and noise are as seen here: those of one new trial, judged by
    itself. Adding them to the old pairs and judging again would pass too often.
    """

    name: str = ""
    statement: str = ""
    claim: dict[str, Any]
    estimate: Annotated[float | None, Field(allow_inf_nan=False)] = None
    low: Annotated[float | None, Field(allow_inf_nan=False)] = None
    high: Annotated[float | None, Field(allow_inf_nan=False)] = None
    num_pairs: Annotated[int, Field(ge=0)]
    num_pairs_planned: Annotated[int, Field(ge=1)]
    pairs_needed: Annotated[int | None, Field(ge=2)] = None

    @model_validator(mode="after")
    def _pass_is_earned(self) -> Self:
        """A file that says PASS without the pairs and the interval for it is not believed."""
        claim = Claim.model_validate(self.claim)
        if self.num_pairs > self.num_pairs_planned:
            raise ValueError(f"{claim.name}: {self.num_pairs} pairs where {self.num_pairs_planned} were planned")
        if self.pairs_needed is not None and self.status != "INCONCLUSIVE":
            raise ValueError(f"{claim.name}: {self.status} needs no further pairs")
        if self.status == "PASS":
            complete = self.num_pairs == self.num_pairs_planned >= 2
            if not complete or self.low is None or self.high is None or not claim.is_cleared(self.low, self.high):
                raise ValueError(f"{claim.name}: PASS, but its pairs or its interval do not say so")
        return self

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Verdict:
        """Raises ``ValueError`` (pydantic's) for anything that :meth:`to_dict` would not write."""
        return cls.model_validate(content)


def judge(
    claim: Claim,
    baseline_values: Sequence[float],
    candidate_values: Sequence[float],
    *,
    num_pairs_planned: int,
    baseline_statuses: Sequence[str],
    candidate_statuses: Sequence[str],
) -> Verdict:
    """The verdict on a claim from the complete pairs of its trial.

    ``*_values``: the claim's metric, shape (complete pairs,), in the order of the pairs.
    ``*_statuses``: how every run of that arm ended (``Outcome.status``), those of broken or
    repeated pairs included. A candidate that cannot run has failed; a baseline that cannot leaves
    nothing to compare with. ``ValueError``: more pairs than planned (n is fixed beforehand), arms
    of unequal length, more values than completed runs, an unknown status.
    """
    num_pairs = _checked_pairs(baseline_values, candidate_values, baseline_statuses, candidate_statuses)
    if num_pairs_planned < 1 or num_pairs > num_pairs_planned:
        raise ValueError(f"{claim.name}: {num_pairs} pairs where {num_pairs_planned} were planned")

    def verdict(status: Status, reason: str, interval: Interval | None = None, further: int | None = None) -> Verdict:
        ends = (interval.estimate, interval.low, interval.high) if interval else ()
        estimate, low, high = (end if 0 < end < math.inf else None for end in ends or (0.0, 0.0, 0.0))
        return Verdict(
            name=claim.name,
            statement=claim.statement,
            claim=claim.model_dump(mode="json"),
            status=status,
            estimate=estimate,
            low=low,
            high=high,
            num_pairs=num_pairs,
            num_pairs_planned=num_pairs_planned,
            pairs_needed=further,
            reason=reason,
        )

    if broken := _first(candidate_statuses, _CANNOT_RUN):
        return verdict("FAIL", f"the candidate cannot run this: {broken}")
    if broken := _first(baseline_statuses, _CANNOT_RUN):
        return verdict("INCONCLUSIVE", f"the baseline cannot run this: {broken}")
    arms = (baseline_values, candidate_values) if claim.direction == "at_least" else (candidate_values, baseline_values)
    interval = ratio_interval(*arms, confidence=CONFIDENCE) if num_pairs else None
    if interval is None or num_pairs < num_pairs_planned:
        refused = _first([*baseline_statuses, *candidate_statuses], _NOT_RUN)
        why = "; a run was refused before or while it measured" if refused else ""
        return verdict("INCOMPLETE", f"{num_pairs} of {num_pairs_planned} pairs measured{why}", interval)
    if interval.log_sd is None:
        return verdict("INCONCLUSIVE", "one pair shows no noise, so there is no interval", interval)
    if claim.is_cleared(interval.low, interval.high):
        return verdict("PASS", _describe(claim, interval, "clears"), interval)
    if claim.is_missed(interval.low, interval.high):
        return verdict("FAIL", _describe(claim, interval, "misses"), interval)
    if claim.direction == "contains":
        return verdict("INCONCLUSIVE", f"{_describe(claim, interval, 'is too wide to exclude')}", interval)
    further = pairs_needed(interval.log_sd, math.log(interval.estimate / claim.bar), CONFIDENCE, POWER)
    advice = (
        f"a new trial of {further} pairs, judged by itself, would probably decide" if further else "no number helps"
    )
    return verdict("INCONCLUSIVE", f"{_describe(claim, interval, 'straddles')}; {advice}", interval, further)


def _checked_pairs(
    baseline_values: Sequence[float],
    candidate_values: Sequence[float],
    baseline_statuses: Sequence[str],
    candidate_statuses: Sequence[str],
) -> int:
    if len(baseline_values) != len(candidate_values):
        raise ValueError(f"{len(baseline_values)} baseline values for {len(candidate_values)} of the candidate")
    for statuses in (baseline_statuses, candidate_statuses):
        if unknown := sorted(set(statuses) - set(_RUN_STATUSES)):
            raise ValueError(f"unknown status {unknown[0]!r}; known: {', '.join(_RUN_STATUSES)}")
        if (completed := sum(status == "completed" for status in statuses)) < len(baseline_values):
            raise ValueError(f"{len(baseline_values)} values from {completed} completed runs")
    return len(baseline_values)


def _first(statuses: Sequence[str], wanted: Sequence[str]) -> str | None:
    return next((status for status in statuses if status in wanted), None)


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
