"""Loss curves laid over each other: did the arms learn the same thing?"""

from __future__ import annotations

import math
from collections.abc import Iterable

from harness.report.arms import Arm, baseline_of
from harness.report.charts.points import curves
from harness.report.page.content import Chart, Row, Section, Table
from harness.report.page.numbers import NONE
from harness.report.run import Run


def build(arms: dict[str, list[Arm]]) -> Section | None:
    """The first complete run of each arm; None if no run logged a loss."""
    parts: list[Chart | Table] = []
    for workload, found in arms.items():
        runs = {arm: arm.example for arm in found}
        losses = {arm: values for arm, run in runs.items() if run and (values := _losses(run))}
        if not losses:
            continue
        baseline = baseline_of(losses)
        reference = losses[baseline] if baseline else None
        rows = tuple(
            Row(_summary(arm, values, reference if baseline is not arm else None), _ids(runs[arm]))
            for arm, values in losses.items()
        )
        told = "; ".join(f"{row.cells[0]} from {row.cells[1]} to {row.cells[2]}" for row in rows)
        series = [(arm.name, arm.backend, list(values.items())) for arm, values in losses.items()]
        title = f"{workload}: training loss"
        parts.append(curves(f"loss-{workload}", title, series, "optimizer step", "nats per trained token", f"{told}."))
        if baseline is not None and (apart := _apart(losses, baseline)):
            told = "; ".join(f"{row.cells[0]} at most {row.cells[4]}" for row in rows if row.cells[4] != NONE)
            title = f"{workload}: difference to legacy at each step"
            parts.append(
                curves(f"apart-{workload}", title, apart, "optimizer step", "nats per trained token", f"{told}.")
            )
        columns = ("Arm", "First step", "Last step", "Mean difference", "Largest")
        parts.append(
            Table(f"{workload}: training loss, nats per trained token, and difference to legacy", columns, rows)
        )
        parts.append(_by_step(workload, losses))
    if not parts:
        return None
    return Section(
        "losses",
        "Loss",
        paragraphs=(
            "One run an arm, the same documents in the same order; lines that lie on each other are the point. Dropout "
            "draws other masks in each stack, so the curves agree but for noise. Whether the difference matters is for "
            "the parity claims to say, not for the eye.",
        ),
        parts=tuple(parts),
    )


def _losses(run: Run) -> dict[int, float]:
    return {
        int(s["step"]): float(s["loss"]) for s in run.steps if s.get("loss") is not None and math.isfinite(s["loss"])
    }


def _ids(run: Run | None) -> tuple[str, ...]:
    return (run.id,) if run else ()


def _summary(arm: Arm, values: dict[int, float], reference: dict[int, float] | None) -> tuple[str, ...]:
    steps = list(values)
    ends = (f"{values[steps[0]]:.3f}", f"{values[steps[-1]]:.3f}")
    shared = [values[step] - reference[step] for step in steps if step in reference] if reference else []
    if not shared:
        return (arm.name, *ends, NONE, NONE)
    return (arm.name, *ends, f"{math.fsum(shared) / len(shared):+.4f}", f"{max(shared, key=abs):+.4f}")


def _apart(losses: dict[Arm, dict[int, float]], baseline: Arm) -> list[tuple[str, str, list[tuple[float, float]]]]:
    """The other arms' losses less the baseline's, at the steps that both have."""
    reference = losses[baseline]
    found: Iterable[tuple[str, str, list[tuple[float, float]]]] = (
        (
            arm.name,
            arm.backend,
            [(step, value - reference[step]) for step, value in values.items() if step in reference],
        )
        for arm, values in losses.items()
        if arm is not baseline
    )
    return [one for one in found if one[2]]


def _by_step(workload: str, losses: dict[Arm, dict[int, float]]) -> Table:
    steps = sorted({step for values in losses.values() for step in values})
    rows = (
        Row((str(step), *(f"{values[step]:.4f}" if step in values else NONE for values in losses.values())))
        for step in steps
    )
    columns = ("Step", *(arm.name for arm in losses))
    return Table(f"{workload}: every step", columns, tuple(rows), is_folded=True)
