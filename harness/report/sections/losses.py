"""Loss curves laid over each other: did the arms learn the same thing?"""

from __future__ import annotations

import math

from forge.training.report.charts.curves import curves
from forge.training.report.page.content import Chart, Row, Section, Table
from forge.training.report.page.numbers import NONE
from harness.perf.suite import LEGACY as BASELINE
from harness.report.arms import ArmRuns, baseline_of
from harness.report.evidence import Run

_AXES = ("optimizer step", "nats per trained token")
_Losses = dict[int, float]  # by step


def build(arms: dict[str, list[ArmRuns]]) -> Section:
    """The first complete run of each arm. Without parts where no run logged a loss."""
    parts: list[Chart | Table] = []
    for workload, of_workload in arms.items():
        examples = [(arm, arm.example) for arm in of_workload if arm.example]
        losses = {arm: values for arm, run in examples if (values := _losses(run))}
        if losses:
            parts += _workload(workload, losses)
    return Section(
        "losses",
        "Loss",
        intro=(
            "One run per arm, the same documents in the same order: the lines should lie on each other. Dropout draws "
            "other masks in each backend, so the curves agree but for noise. Whether a difference matters is judged "
            "by the parity claims, not by eye."
        ),
        parts=tuple(parts),
    )


def _workload(workload: str, losses: dict[ArmRuns, _Losses]) -> list[Chart | Table]:
    baseline = baseline_of(losses)
    reference = losses[baseline] if baseline else {}
    differences = {arm: _less(values, reference) for arm, values in losses.items() if arm is not baseline}
    differences = {arm: values for arm, values in differences.items() if values}
    rows = tuple(_row(arm, values, differences.get(arm)) for arm, values in losses.items())
    ends = "; ".join(f"{row.cells[0]} from {row.cells[1]} to {row.cells[2]}" for row in rows)
    parts: list[Chart | Table] = [
        curves(f"loss-{workload}", f"{workload}: training loss", _series(losses), *_AXES, f"{ends}.")
    ]
    title = f"difference to {BASELINE.name}"
    if differences:
        most = "; ".join(f"{row.cells[0]} at most {row.cells[4]}" for row in rows if row.cells[4] != NONE)
        of_step = f"{workload}: {title} at each step"
        parts.append(curves(f"loss-difference-{workload}", of_step, _series(differences), *_AXES, f"{most}."))
    columns = ("Arm", "First step", "Last step", "Mean difference", "Largest")
    parts.append(Table(f"{workload}: training loss, nats per trained token, and {title}", columns, rows))
    steps = sorted({step for values in losses.values() for step in values})
    by_step = (
        Row((str(step), *(f"{values[step]:.4f}" if step in values else NONE for values in losses.values())))
        for step in steps
    )
    names = (arm.name for arm in losses)
    return [*parts, Table(f"{workload}: every step", ("Step", *names), tuple(by_step), is_folded=True)]


def _losses(run: Run) -> _Losses:
    logged = ((int(step["step"]), step.get("loss")) for step in run.steps)
    return {step: float(loss) for step, loss in logged if loss is not None and math.isfinite(loss)}


def _less(values: _Losses, reference: _Losses) -> _Losses:
    """The differences at the steps that both have."""
    return {step: value - reference[step] for step, value in values.items() if step in reference}


def _series(losses: dict[ArmRuns, _Losses]) -> list[tuple[str, str, list[tuple[float, float]]]]:
    return [(arm.name, arm.backend, list(values.items())) for arm, values in losses.items()]


def _row(arm: ArmRuns, values: _Losses, differences: _Losses | None) -> Row:
    logged = list(values.values())
    mean, largest = NONE, NONE
    if differences:
        mean = f"{math.fsum(differences.values()) / len(differences):+.4f}"
        largest = f"{max(differences.values(), key=abs):+.4f}"
    cells = (arm.name, f"{logged[0]:.3f}", f"{logged[-1]:.3f}", mean, largest)
    return Row(cells, (arm.example.id,) if arm.example else ())
