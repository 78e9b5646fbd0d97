"""The verdict table: each claim with its estimate, interval, bar, pairs and the noise of equal arms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from forge.training.system.errors import DataError
from harness.perf.claims import CLAIMS, Claim, Status, Verdict
from harness.report.charts.points import Estimate, margins
from harness.report.evidence import Entry, Evidence
from harness.report.page.content import Row, Section, Table
from harness.report.page.numbers import NONE, digits, number, percent, spread, tied, times
from harness.report.recheck import recheck

WORST_FIRST = ("FAIL", "INCOMPLETE", "INCONCLUSIVE", "PASS")
_CONTROL = "contains"


@dataclass(frozen=True)
class Judged:
    """A claim's verdict and the runs it was judged on; ``entry`` is None where the gate left none."""

    claim: Claim
    verdict: Verdict
    entry: Entry | None
    is_rechecked: bool = False  # estimate and interval follow from the store's pairs

    @property
    def run_ids(self) -> tuple[str, ...]:
        return self.entry.run_ids if self.entry else ()


def judged_claims(evidence: Evidence) -> list[Judged]:
    """All claims of the acceptance table and of the JSON. One that was not judged is INCOMPLETE. Raises DataError."""
    found: dict[str, Judged] = {}
    for entry in evidence.of_kind("claim"):
        try:
            verdict = Verdict.from_dict(entry.info.get("verdict") or {})
        except ValueError as error:
            first = " ".join(str(error).split())[:300]
            raise DataError(f"entry {entry.name}: extra_info.verdict is not a verdict: {first}") from error
        claim = Claim.model_validate(verdict.claim)
        if claim.name in found:
            raise DataError(f"{claim.name} is judged twice, the second time by entry {entry.name}")
        found[claim.name] = Judged(claim, verdict, entry, recheck(verdict, evidence))
    for claim in CLAIMS:
        if claim.name not in found:
            found[claim.name] = Judged(claim, _not_judged(claim), None)
    order = {claim.name: place for place, claim in enumerate(CLAIMS)}
    return sorted(found.values(), key=lambda judged: order.get(judged.claim.name, len(order)))


def overall(judged: list[Judged], others: dict[str, list[Status]] | None = None, *, is_partial: bool = False) -> str:
    """The worst status: green only if every claim and every other room passed and the gate came to its end.

    ``others``: statuses of the verdicts on accuracy, export and reliability.
    """
    statuses: list[str] = [one.verdict.status for one in judged]
    statuses += [status for found in (others or {}).values() for status in found]
    return min([*statuses, "INCOMPLETE"] if is_partial else statuses, key=WORST_FIRST.index)


def headline(judged: list[Judged], others: dict[str, list[Status]] | None = None) -> str:
    """``5 of 6 claims passed, 1 FAIL. Accuracy: 6 of 8, 2 INCOMPLETE.``"""
    told = [_counted([one.verdict.status for one in judged], " claims passed")]
    told += [f"{room.capitalize()}: {_counted(found, ' passed')}" for room, found in (others or {}).items()]
    return " ".join(told)


def _counted(statuses: Sequence[str], what: str) -> str:
    counts = {status: statuses.count(status) for status in WORST_FIRST}
    rest = "".join(f", {num} {status}" for status, num in counts.items() if num and status != "PASS")
    return f"{counts['PASS']} of {len(statuses)}{what}{rest}."


def build(evidence: Evidence, judged: list[Judged]) -> Section:
    rows = tuple(
        Row(
            cells=(
                one.claim.statement,
                _value(one.claim, one.verdict.estimate),
                _interval(one.claim, one.verdict),
                _bar(one.claim),
                tied(f"{one.verdict.num_pairs} of {one.verdict.num_pairs_planned}") if one.entry else "0",
                _noise(one.claim, judged, evidence),
            ),
            runs=one.run_ids,
            status=one.verdict.status,
            anchor=f"claim-{one.claim.name}",
            note=f"{one.claim.name}: {one.verdict.reason}",
        )
        for one in judged
    )
    shown = [_estimate(one) for one in judged if one.claim.direction != _CONTROL]
    table = Table("The acceptance table", ("Claim", "Estimate", "95% interval", "Bar", "Pairs", "A/A noise"), rows)
    parts = (table, margins("margins", "Each claim's interval, seen from its bar", shown)) if shown else (table,)
    return Section("verdicts", "Verdicts", parts=parts, notes=_notes(judged))


def _notes(judged: list[Judged]) -> tuple[str, ...]:
    notes = [
        "Estimate: geometric mean of paired ratios, every value from a fresh process. Interval: paired t on their "
        "logarithms. A claim passes only if the worse end of the interval clears the bar; the number of pairs was "
        "fixed before the first. INCONCLUSIVE and INCOMPLETE are not passes.",
        "A/A noise: for seconds half the width of the control's interval (legacy against legacy, the same procedure); "
        "for memory the spread between the control's runs.",
    ]
    with_estimate = [one for one in judged if one.verdict.estimate is not None]
    if with_estimate and all(one.is_rechecked for one in with_estimate):
        notes.append(
            "Every estimate and interval above was computed again from the store's pairs for this report: equal."
        )
    elif with_estimate:
        names = ", ".join(one.claim.name for one in with_estimate if not one.is_rechecked)
        notes.append(f"Not computed again, since the store does not hold their trials as judged: {names}.")
    current = {claim.name: claim for claim in CLAIMS}
    for one in judged:
        now = current.get(one.claim.name)
        if now is not None and now != one.claim:
            notes.append(
                f"{one.claim.name} was judged as another claim than the acceptance table now holds: "
                f"{_bar(one.claim)} of {one.claim.metric} then, {_bar(now)} of {now.metric} now."
            )
    return tuple(notes)


def _not_judged(claim: Claim) -> Verdict:
    return Verdict(
        claim=claim.model_dump(mode="json"),
        status="INCOMPLETE",
        num_pairs=0,
        num_pairs_planned=1,
        reason="the gate left no verdict on it",
    )


def _value(claim: Claim, value: float | None, significant: int = 3) -> str:
    if value is None:
        return NONE
    shown = {"at_least": times(value, significant), "at_most": percent(value, significant)}
    return shown.get(claim.direction, digits(value, significant + 1))


def _interval(claim: Claim, verdict: Verdict) -> str:
    if verdict.low is None or verdict.high is None:
        return NONE
    for significant in (3, 4, 5):  # as many digits as it takes to tell the ends apart
        low, high = (_value(claim, end, significant) for end in (verdict.low, verdict.high))
        if low != high:
            break
    return tied(f"{low} to {high}")


def _bar(claim: Claim) -> str:
    signs = {"at_least": "≥ ", "at_most": "≤ ", _CONTROL: "holds "}
    shown = number(claim.bar, 1) if claim.direction == _CONTROL else _value(claim, claim.bar)
    within = f", within {claim.tolerance:.0%}" if claim.tolerance is not None else ""
    return tied(signs[claim.direction] + shown) + within


def _noise(claim: Claim, judged: list[Judged], evidence: Evidence) -> str:
    control = next((one for one in judged if one.claim.direction == _CONTROL), None)
    if control is None or control.entry is None:
        return NONE
    if claim.metric == control.claim.metric:
        low, high = control.verdict.low, control.verdict.high
        return NONE if low is None or high is None else _plus_minus(low, high)
    found = spread([run.measure(claim.metric) for run in evidence.runs_of([control.entry])])
    return NONE if found is None or found.num < 2 or found.low <= 0 else _plus_minus(found.low, found.high)


def _plus_minus(low: float, high: float) -> str:
    half = math.sqrt(high / low) - 1
    return tied("< 0.01%") if half < 1e-4 else f"±{percent(half, 2)}"


def _estimate(one: Judged) -> Estimate:
    """On a scale where 1 is the bar and more is better, whichever way the claim points."""

    def margin(value: float | None) -> float | None:
        if value is None:
            return None
        return value / one.claim.bar if one.claim.direction == "at_least" else one.claim.bar / value

    verdict = one.verdict
    ends = sorted(end for end in (margin(verdict.low), margin(verdict.high)) if end is not None)
    low, high = ends if len(ends) == 2 else (None, None)
    text = (
        f"{_value(one.claim, verdict.estimate)} ({_interval(one.claim, verdict)})"
        if verdict.estimate
        else "no estimate"
    )
    return Estimate(one.claim.name, verdict.status, text, margin(verdict.estimate), low, high)
