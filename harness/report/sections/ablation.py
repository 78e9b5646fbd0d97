"""Where the gain comes from: one change after the other; and how much of the GPU's arithmetic is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, Field

from forge.training.backends import BACKENDS
from forge.training.report.charts.bars import Bar, bars
from forge.training.report.page.content import Chart, Row, Section, Table
from forge.training.report.page.numbers import GIB, NONE, digits, gib
from harness.report.arms import ArmRuns, ratio
from harness.report.evidence import Evidence
from harness.report.page.numbers import percent, times, with_range

_TERA = 1e12
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class MatmulPeak(BaseModel):
    """extra_info: measured matrix products, and what the backends reach of them (a share of 1)."""

    workload: str | None = None
    tflops: _Positive
    model_flops_per_second: dict[str, _Positive] = {}
    utilisation: dict[str, _Positive] = {}


def build(arms: Sequence[ArmRuns]) -> Section:
    """One run per arm; each adds one change to the arm before it, until the backend changes."""
    parts: list[Chart | Table] = []
    for workload in dict.fromkeys(arm.workload for arm in arms):
        of_workload = [arm for arm in arms if arm.workload == workload]
        first = of_workload[0].measure("measured_seconds")
        rows, items, before = [], [], None
        for arm in of_workload:
            seconds, peak = arm.measure("measured_seconds"), arm.measure("peak_allocated_bytes")
            speed = arm.measure("documents_per_second")
            text = arm.failure or "not measured"
            if speed and peak:
                text = f"{digits(speed.middle)} documents/s, {times(ratio(first, seconds))}, {gib(peak.middle)}"
            items.append(Bar(arm.name, arm.backend, speed.middle if speed else None, text))
            cells = (arm.name, arm.layout, with_range(speed) if speed else text, times(ratio(before, seconds)))
            rows.append(Row((*cells, times(ratio(first, seconds)), with_range(peak, scale=GIB)), arm.run_ids))
            before = seconds
        columns = ("Change", "Layout", "Documents/s", "To the one before", "To the first", "Peak, GiB")
        parts.append(bars(f"ablation-{workload}", f"{workload}: documents/s, change by change", items))
        parts.append(Table(f"{workload}: the ablation", columns, tuple(rows), texts=2))
    return Section(
        "ablation",
        "Where the gain comes from",
        intro=(
            "An ablation: each line makes one change to the line before it. One run per line, the same work in each. "
            "It shows causes; it is not a claim."
        ),
        parts=tuple(parts),
    )


def build_matmul_peak(evidence: Evidence) -> Section:
    """Model FLOP/s against the matrix-product peak measured on the same GPU."""
    parts: list[Chart | Table] = []
    for number, entry in enumerate(evidence.of_kind("matmul_peak"), 1):
        peak, probe = entry.parse(MatmulPeak), evidence.probe_of(entry)
        rows = [
            Row(("matrix products (the peak)", digits(peak.tflops), percent(1.0)), (probe,) if probe else entry.run_ids)
        ]
        items = []
        for name in dict.fromkeys([*peak.model_flops_per_second, *peak.utilisation]):
            flops, share = peak.model_flops_per_second.get(name), peak.utilisation.get(name)
            reached = None if flops is None else flops / _TERA
            shown = NONE if reached is None else digits(reached)
            backend = next((known for known in BACKENDS if name.startswith(known)), name)
            ids = tuple(run.id for run in evidence.runs_of([entry]) if run.backend == backend)
            rows.append(Row((name, shown, percent(share)), ids))
            items.append(Bar(name, backend, reached, f"{shown} TFLOP/s, {percent(share)}"))
        where = f"{peak.workload}: " if peak.workload else ""
        if items:
            line = (peak.tflops, f"peak {digits(peak.tflops)} TFLOP/s")
            parts.append(bars(f"matmul-peak-{number}", f"{where}model FLOP/s against the peak", items, line))
        columns = ("Backend", "TFLOP/s", "Of the peak")
        parts.append(Table(f"{where}model FLOPs utilisation (MFU)", columns, tuple(rows), is_beside=bool(items)))
    return Section(
        "matmul-peak",
        "Use of the GPU's arithmetic",
        intro=(
            "Model FLOPs: those that the model's forward and backward pass need, without recomputation. The peak is "
            "not a data sheet's: it is that of large bfloat16 matrix products, measured on this GPU in the same gate."
        ),
        parts=tuple(parts),
    )
