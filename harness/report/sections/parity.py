"""Accuracy: the parity ladder with one verdict per rung, loss curves in the noise band, held-out differences."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from forge.training.report.page.content import Chart, Row, Section, Table
from forge.training.report.page.numbers import NONE, digits
from harness.parity.outcome import ROLES
from harness.report.charts.bands import Difference, differences, within_band
from harness.report.evidence import Entry, figures_of
from harness.report.page.numbers import count, number, percent
from harness.report.verdicts import Judged, verdict_table

_STOCK = "unchanged"
_QUANTITIES = {"loss": "training loss", "grad_norm": "logarithm of the gradient norm"}


_Figures = dict[str, Any]
_Names = tuple[str, str]  # baseline, candidate


def build(judged: list[Judged]) -> Section:
    """Raises :class:`DataError` for figures that cannot be shown."""
    rungs = {verdict.figures.get("rung"): (verdict.figures, entry) for verdict, entry in judged}
    parts: list[Chart | Table] = [verdict_table("parity", judged, "The ladder", "Rung")]
    for place, build_parts in ((4, _noise), (5, _trajectory), (6, _outcome), (2, _checks), (3, _checks)):
        figures, entry = rungs[place]
        if entry:
            with figures_of(entry):
                parts += build_parts(figures, _names(entry))
    return Section(
        "parity",
        "Accuracy: the parity ladder",
        intro=(
            "Does the candidate train as well as the baseline? Six rungs, from the numbers that go in to held-out "
            "documents; each stands on those below it. A backend's speed counts only where all of them pass."
        ),
        parts=tuple(parts),
    )


def _names(entry: Entry) -> _Names:
    return str(entry.info.get("baseline") or "baseline"), str(entry.info.get("arm") or "candidate")


def _checks(figures: _Figures, _: _Names) -> list[Chart | Table]:
    rows = tuple(
        Row(
            (quantization, str(check["name"]), number(check["value"]), _wanted(check)),
            status="PASS" if check["holds"] else "FAIL",
        )
        for quantization, checks in figures.get("checks", {}).items()
        for check in checks
    )
    caption = f"Rung {figures['rung']}, check by check"
    table = Table(caption, ("Base", "What", "Measured", "Wanted"), rows, texts=2, is_folded=True, is_wide=True)
    return [table] if rows else []


def _wanted(check: _Figures) -> str:
    if check["least"] and 0 < check["bar"] < sys.float_info.min:  # the number next to 0
        return "more than 0"
    return f"{'at least' if check['least'] else 'at most'} {number(check['bar'])}"


def _noise(figures: _Figures, names: _Names) -> list[Chart | Table]:
    rows = tuple(
        Row(
            (
                ", ".join(layout["plan"]) or "its own layout",
                digits(layout["loss_rms"]),
                percent(layout["grad_norm_rms"]),
            ),
            (layout["run_id"],),
        )
        for layout in figures.get("layouts", ())
    )
    title = f"Rung 4: how far {names[0]} moves from its own mean when only rounding changes (rms per step)"
    return [Table(title, ("Layout", "Loss, nats", "Gradient norm"), rows)] if rows else []


def _trajectory(figures: _Figures, names: _Names) -> list[Chart | Table]:
    parts: list[Chart | Table] = []
    for quantity, curve in figures.get("curves", {}).items():
        baseline, half, candidate = (curve[key] for key in ("baseline", "half_width", "candidate"))
        judged = figures["candidate"][quantity]
        inside = "inside" if judged["is_inside"] else "outside"
        peak = "the peak is not known"
        if judged["peak_spreads"] is not None and judged["peak_limit_spreads"] is not None:
            peak = f"{judged['peak_spreads']:.2g} spreads at step {judged['peak_step']}"
            peak += f", {judged['peak_limit_spreads']:.2g} allowed"
        drift = f"drift {judged['drift']:+.2g}, {judged['drift_limit']:.2g} allowed"
        words = f"{names[1]} is {inside}: {peak}; {drift}."
        unit = "nats per trained token" if quantity == "loss" else "natural logarithm"
        title = f"Rung 5: {_QUANTITIES[quantity]}"
        if quantity == "loss":
            parts.append(within_band(f"parity-{quantity}", title, names, baseline, half, candidate, unit, words))
        differences = [value - middle for value, middle in zip(candidate, baseline, strict=True)]
        level = [0.0] * len(baseline)
        title += f", less the mean of {names[0]}"
        parts.append(within_band(f"parity-{quantity}-difference", title, names, level, half, differences, unit, words))
    rows = tuple(
        Row((run, _QUANTITIES[quantity], _of(judged, "peak"), _of(judged, "drift"), str(judged["num_steps_outside"])))
        for run, key in ((names[1], "candidate"), (f"{names[0]}, {figures.get('fault')}", "control"))
        for quantity, judged in figures.get(key, {}).items()
    )
    if rows:
        columns = ("Run", "Quantity", "Peak, spreads (allowed)", "Drift (allowed)", "Steps outside")
        parts.append(Table("Rung 5: the candidate, and a planted fault that must be seen", columns, rows, texts=2))
    return parts


def _of(judged: _Figures, what: str) -> str:
    if what == "drift":
        return f"{judged['drift']:+.2g} ({judged['drift_limit']:.2g})"
    value, limit = judged["peak_spreads"], judged["peak_limit_spreads"]
    return NONE if value is None or limit is None else f"{value:.2f} ({limit:.2f})"


def _outcome(figures: _Figures, names: _Names) -> list[Chart | Table]:
    if "seeds" not in figures:
        return []
    margin, test, to_stock = figures["plan"]["margin_nats"], figures["equivalence"], figures["no_worse_than_stock"]
    seeds = [Difference(f"seed {row['seed']}", row["difference"]) for row in figures["seeds"]]
    interval = Difference("mean", test["mean"], test["low"], test["high"])
    stock = Difference(f"to {_STOCK}", to_stock["mean"], to_stock["low"], to_stock["high"])
    documents = figures["documents"]
    by_document = [Difference(str(row["document"]), row["candidate"] - row["baseline"]) for row in documents["rows"]]
    by_document.sort(key=lambda difference: difference.middle)
    kept = {role: ", ".join(dtypes) for role, dtypes in figures["precision"].items()}
    arms = (f"{names[0]}, adapter in {kept['baseline']}", names[1])
    by_seed = f"nats per token ({names[0]} {_STOCK} keeps its adapter in {kept['stock']})"
    title = f"Rung 6: held-out loss of {names[1]} less that of {arms[0]}"
    rows = tuple(
        Row(
            (
                str(row["seed"]),
                *(f"{row[key]:.4f}" for key in ("base", *ROLES)),
                *(f"{row[key]:+.4f}" for key in ("difference", "difference_to_stock")),
            )
        )
        for row in figures["seeds"]
    )
    columns = ("Seed", "Base", *arms, f"{names[0]}, {_STOCK}", "Difference", f"To {names[0]}, {_STOCK}")
    return [
        differences("parity-seeds", f"{title}, by seed", [*seeds, interval, stock], margin),
        differences("parity-documents", f"{title}, by document (mean over seeds)", by_document, None),
        Table(f"Rung 6: held-out loss by seed, {by_seed}", columns, rows),
        Table("Rung 6: other measures", ("", *columns[1:5]), tuple(_others(figures)), texts=1),
        _documents(documents, arms),
    ]


def _others(figures: _Figures) -> Iterable[Row]:
    rouge, facts, num_facts = figures["rouge_l"], figures["facts"], figures["num_facts"]
    yield Row(("ROUGE-L of greedy answers", *(number(rouge[side]) for side in ("base", *ROLES))))
    recited = [f"{sum(num == num_facts for num in facts[role])} of {len(facts[role])} runs" for role in ROLES]
    yield Row(("the planted fact recited", NONE, *recited))
    gains = [figures["gain_over_base"][role] for role in ROLES]
    shown = [f"{gain['mean']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})" for gain in gains]
    yield Row(("held-out loss less the base's, nats per token", NONE, *shown))


def _documents(documents: _Figures, names: _Names) -> Table:
    rows = tuple(
        Row(
            (
                str(row["document"]),
                count(row["num_tokens"]),
                *(f"{row[key]:.4f}" for key in ("base", "baseline", "candidate")),
                f"{row['candidate'] - row['baseline']:+.4f}",
            )
        )
        for row in documents["rows"]
    )
    error = documents["standard_error_nats_per_token"]
    caption = f"Rung 6, every held-out document: nats per token; all: {documents['difference_nats_per_token']:+.5f}"
    caption += f", standard error over documents {number(error)}"
    return Table(caption, ("Document", "Tokens", "Base", *names, "Difference"), rows, is_folded=True)
