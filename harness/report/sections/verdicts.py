"""The acceptance table: each claim with its estimate, interval, bar, pairs and the noise of equal arms."""

from __future__ import annotations

import math
from typing import Any

from forge.training.report.page.content import Row, Section, Table
from forge.training.report.page.numbers import NONE, digits, tied
from harness.perf.claims import Claim
from harness.report.charts.points import Estimate, margins
from harness.report.evidence import Evidence
from harness.report.page.numbers import number, percent, spread, times
from harness.report.verdicts import Judged
from harness.verdict import Verdict

_CONTROL = "contains"
_NOTES = (
    "Estimate: geometric mean of paired ratios, every value from a fresh process. Interval: paired t on their "
    "logarithms. A claim passes only if the worse end of the interval clears the bar; the number of pairs was "
    "fixed before the first. INCONCLUSIVE and INCOMPLETE are not passes.",
    "A/A noise: for seconds half the width of the control's interval (the baseline against itself, measured in the "
    "same way); for memory the spread between the control's runs.",
    "Estimates, intervals and the verdicts on them were computed again from the store's pairs for this report: equal.",
)


def build(evidence: Evidence, judged: list[Judged]) -> Section:
    known = [(Claim.model_validate(verdict.figures["claim"]), verdict) for verdict, _ in judged if verdict.figures]
    control = next((verdict for claim, verdict in known if claim.direction == _CONTROL), None)
    rows = [_row(verdict, claim, _noise(claim, control, evidence)) for claim, verdict in known]
    rows += [_row(verdict) for verdict, _ in judged if not verdict.figures]
    table = Table(
        "The acceptance table", ("Claim", "Estimate", "95% interval", "Bar", "Pairs", "A/A noise"), tuple(rows)
    )
    shown = [_estimate(claim, verdict) for claim, verdict in known if claim.direction != _CONTROL]
    chart = margins("margins", "Each claim's interval, seen from its bar", shown)
    return Section("verdicts", "Verdicts", parts=(table, chart), notes=_NOTES)


def _row(verdict: Verdict, claim: Claim | None = None, noise: str = NONE) -> Row:
    """``claim`` is None for a name that the acceptance table does not hold."""
    figures = verdict.figures
    pairs = tied(f"{figures['num_pairs']} of {figures['num_pairs_planned']}") if figures.get("num_pairs") else "0"
    numbers = (_value(claim, figures["estimate"]), _interval(claim, figures), _bar(claim)) if claim else (NONE,) * 3
    return Row(
        cells=(verdict.statement, *numbers, pairs, noise),
        runs=tuple(verdict.run_ids),
        status=verdict.status,
        anchor=f"claim-{verdict.name}",
        note=f"{verdict.name}: {verdict.reason}",
    )


def _value(claim: Claim, value: float | None, significant: int = 3) -> str:
    if value is None:
        return NONE
    shown = {"at_least": times(value, significant), "at_most": percent(value, significant)}
    return shown.get(claim.direction, digits(value, significant + 1))


def _interval(claim: Claim, figures: dict[str, Any]) -> str:
    if figures["low"] is None or figures["high"] is None:
        return NONE
    for significant in (3, 4, 5):  # as many digits as it takes to tell the ends apart
        low, high = (_value(claim, figures[end], significant) for end in ("low", "high"))
        if low != high:
            break
    return tied(f"{low} to {high}")


def _bar(claim: Claim) -> str:
    signs = {"at_least": "≥ ", "at_most": "≤ ", _CONTROL: "holds "}
    shown = number(claim.bar, 1) if claim.direction == _CONTROL else _value(claim, claim.bar)
    within = f", within {claim.tolerance:.0%}" if claim.tolerance is not None else ""
    return tied(signs[claim.direction] + shown) + within


def _noise(claim: Claim, control: Verdict | None, evidence: Evidence) -> str:
    if control is None or control.figures["low"] is None or control.figures["high"] is None:
        return NONE
    if claim.metric == control.figures["claim"]["metric"]:
        return _plus_minus(control.figures["low"], control.figures["high"])
    runs = spread([evidence.runs[run_id].measure(claim.metric) for run_id in control.run_ids])
    return NONE if runs is None or runs.num < 2 or runs.low <= 0 else _plus_minus(runs.low, runs.high)


def _plus_minus(low: float, high: float) -> str:
    half = math.sqrt(high / low) - 1
    return tied("< 0.01%") if half < 1e-4 else f"±{percent(half, 2)}"


def _estimate(claim: Claim, verdict: Verdict) -> Estimate:
    """On a scale where 1 is the bar and more is better, whichever way the claim points."""

    def margin(name: str) -> float | None:
        value = verdict.figures[name]
        if value is None:
            return None
        return float(value / claim.bar if claim.direction == "at_least" else claim.bar / value)

    ends = ("low", "high") if claim.direction == "at_least" else ("high", "low")
    interval = f"{_value(claim, verdict.figures['estimate'])} ({_interval(claim, verdict.figures)})"
    text = interval if verdict.figures["estimate"] else "no estimate"
    return Estimate(claim.name, verdict.status, text, margin("estimate"), *map(margin, ends))
