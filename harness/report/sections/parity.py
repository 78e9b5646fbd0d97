"""Accuracy: the parity ladder with a verdict a rung, loss curves with the noise band, paired held-out differences."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from harness.parity.outcome.judge import ROLES
from harness.report.charts.bands import Difference, differences, within_band
from harness.report.evidence import Evidence
from harness.report.page.content import Chart, Row, Section, Table
from harness.report.page.numbers import NONE, count, digits, number, percent
from harness.report.stated import Stated, figures_of, read_stated, verdict_table

_STOCK = "as it is"
_QUANTITIES = {"loss": "training loss", "grad_norm": "logarithm of the gradient norm"}


def build(evidence: Evidence) -> Section:
    """Raises :class:`DataError` for a verdict that cannot be read."""
    found = read_stated(evidence, "parity")
    rungs = {one.number: one for one in found if one.number is not None}
    parts: list[Chart | Table] = [verdict_table(found, "The ladder", "Rung")]
    for place, build_part in ((4, _noise), (5, _trajectory), (6, _outcome)):
        if rungs[place].figures:
            with figures_of(rungs[place].entry):
                parts += build_part(rungs[place], rungs[place].names)
    for place in (2, 3):
        if rungs[place].figures.get("checks"):
            with figures_of(rungs[place].entry):
                parts.append(_checks(rungs[place]))
    return Section(
        "parity",
        "Accuracy: the parity ladder",
        paragraphs=(
            "Are the candidate's weights worth as much as the baseline's? Six rungs, from the numbers that go in to "
            "held-out documents; each stands on those below it. A model's speed counts only where they hold.",
        ),
        parts=tuple(parts),
    )


def _checks(rung: Stated) -> Table:
    rows = tuple(
        Row(
            (
                quantization,
                str(check["name"]),
                number(check["value"]),
                _wanted(check),
            ),
            status="PASS" if check["holds"] else "FAIL",
        )
        for quantization, checks in rung.figures["checks"].items()
        for check in checks
    )
    columns = ("Base", "What", "Found", "Wanted")
    return Table(f"Rung {rung.number}, check by check", columns, rows, texts=2, is_folded=True, is_wide=True)


def _wanted(check: dict[str, Any]) -> str:
    if check["least"] and 0 < check["bar"] < sys.float_info.min:  # the number next to 0
        return "more than 0"
    return f"{'at least' if check['least'] else 'at most'} {number(check['bar'])}"


def _noise(rung: Stated, names: tuple[str, str]) -> list[Chart | Table]:
    rows = tuple(
        Row(
            (
                ", ".join(layout["plan"]) or "its owner's layout",
                digits(layout["loss_rms"]),
                percent(layout["grad_norm_rms"]),
            ),
            (layout["run_id"],),
        )
        for layout in rung.figures.get("layouts", ())
    )
    columns = ("Layout", "Loss, nats", "Gradient norm")
    title = f"Rung 4: how far {names[0]} strays from its own mean when nothing but rounding changes (rms a step)"
    return [Table(title, columns, rows)] if rows else []


def _trajectory(rung: Stated, names: tuple[str, str]) -> list[Chart | Table]:
    parts: list[Chart | Table] = []
    for quantity, curve in rung.figures.get("curves", {}).items():
        baseline, half, candidate = (curve[key] for key in ("baseline", "half_width", "candidate"))
        told = rung.figures["candidate"][quantity]
        inside = "inside" if told["is_inside"] else "outside"
        peak = "the peak is not known"
        if told["peak_spreads"] is not None and told["peak_limit_spreads"] is not None:
            peak = f"{told['peak_spreads']:.2g} spreads at step {told['peak_step']}"
            peak += f", {told['peak_limit_spreads']:.2g} allowed"
        words = f"{names[1]} is {inside}: {peak}; drift {told['drift']:+.2g}, {told['drift_limit']:.2g} allowed"
        unit = "nats per trained token" if quantity == "loss" else "natural logarithm"
        title = f"Rung 5: {_QUANTITIES[quantity]}"
        if quantity == "loss":
            parts.append(within_band(f"parity-{quantity}", title, names, baseline, half, candidate, unit, f"{words}."))
        apart = [value - middle for value, middle in zip(candidate, baseline, strict=True)]
        level = [0.0] * len(baseline)
        title += f", less the mean of {names[0]}"
        parts.append(within_band(f"parity-{quantity}-apart", title, names, level, half, apart, unit, f"{words}."))
    rows = tuple(
        Row((role, _QUANTITIES[quantity], _of(told, "peak"), _of(told, "drift"), str(told["num_steps_outside"])))
        for role, key in ((names[1], "candidate"), (f"{names[0]}, {rung.figures.get('fault')}", "control"))
        for quantity, told in rung.figures.get(key, {}).items()
    )
    if rows:
        columns = ("Run", "Quantity", "Peak, spreads (allowed)", "Drift (allowed)", "Steps outside")
        parts.append(Table("Rung 5: the candidate, and a planted fault that must be seen", columns, rows, texts=2))
    return parts


def _of(told: dict[str, Any], what: str) -> str:
    if what == "drift":
        return f"{told['drift']:+.2g} ({told['drift_limit']:.2g})"
    value, limit = told["peak_spreads"], told["peak_limit_spreads"]
    return NONE if value is None or limit is None else f"{value:.2f} ({limit:.2f})"


def _outcome(rung: Stated, names: tuple[str, str]) -> list[Chart | Table]:
    figures = rung.figures
    if "seeds" not in figures:
        return []
    margin, test, to_stock = figures["plan"]["margin_nats"], figures["equivalence"], figures["no_worse_than_stock"]
    seeds = [Difference(f"seed {row['seed']}", row["difference"]) for row in figures["seeds"]]
    interval = Difference("mean", test["mean"], test["low"], test["high"])
    stock = Difference(f"to {_STOCK}", to_stock["mean"], to_stock["low"], to_stock["high"])
    documents = figures["documents"]
    by_document = [Difference(str(row["document"]), row["candidate"] - row["baseline"]) for row in documents["rows"]]
    kept = {role: ", ".join(dtypes) for role, dtypes in figures["precision"].items()}
    arms = (f"{names[0]}, adapter in {kept['baseline']}", names[1])
    by_seed = f"nats a token ({names[0]} {_STOCK} keeps its adapter in {kept['stock']})"
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
        differences("parity-documents", f"{title}, by document (mean over seeds)", _sorted(by_document), None),
        Table(f"Rung 6: held-out loss by seed, {by_seed}", columns, rows),
        Table("Rung 6: what else was asked", ("", *columns[1:5]), tuple(_others(figures)), texts=1),
        _documents(documents, arms),
    ]


def _sorted(found: list[Difference]) -> list[Difference]:
    return sorted(found, key=lambda one: one.middle)


def _others(figures: dict[str, Any]) -> Iterable[Row]:
    rouge, facts, num_facts = figures["rouge_l"], figures["facts"], figures["num_facts"]
    yield Row(("ROUGE-L of greedy answers", *(number(rouge[side]) for side in ("base", *ROLES))))
    told = [f"{sum(found == num_facts for found in facts[role])} of {len(facts[role])} runs" for role in ROLES]
    yield Row(("the planted fact recited", NONE, *told))
    gains = [figures["gain_over_base"][role] for role in ROLES]
    shown = [f"{gain['mean']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})" for gain in gains]
    yield Row(("held-out loss less the base's, nats a token", NONE, *shown))


def _documents(documents: dict[str, Any], names: tuple[str, str]) -> Table:
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
    caption = f"Rung 6, every held-out document: nats a token; all: {documents['difference_nats_per_token']:+.5f}"
    caption += f", standard error over documents {number(error)}"
    return Table(caption, ("Document", "Tokens", "Base", *names, "Difference"), rows, is_folded=True)
