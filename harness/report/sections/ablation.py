"""Where the gain comes from, and how much of the GPU's arithmetic is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, Field

from harness.report.arms import BACKENDS, Arm, ratio
from harness.report.charts.bars import Bar, bars
from harness.report.evidence import Evidence
from harness.report.page.content import Chart, Row, Section, Table
from harness.report.page.numbers import GIB, NONE, digits, gib, percent, times, with_range

_TERA = 1e12
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Ceiling(BaseModel):
    """extra_info of a ceiling: measured matrix products, and what the backends make of them (a share of 1)."""

    workload: str | None = None
    tflops: _Positive
    model_flops_per_second: dict[str, _Positive] = {}
    utilisation: dict[str, _Positive] = {}


def build(rungs: Sequence[Arm]) -> Section | None:
    """One run a rung; each adds one thing to the rung before it, until the backend changes."""
    if not rungs:
        return None
    parts: list[Chart | Table] = []
    for workload in dict.fromkeys(rung.workload for rung in rungs):
        found = [rung for rung in rungs if rung.workload == workload]
        first = found[0].measure("measured_seconds")
        rows, items, before = [], [], None
        for rung in found:
            seconds, peak = rung.measure("measured_seconds"), rung.measure("peak_allocated_bytes")
            speed = rung.measure("documents_per_second")
            text = rung.failure or "not measured"
            if speed and peak:
                text = f"{digits(speed.middle)} documents/s, {times(ratio(first, seconds))}, {gib(peak.middle)}"
            items.append(Bar(rung.name, rung.backend, speed.middle if speed else None, text))
            cells = (rung.name, rung.layout, with_range(speed) if speed else text, times(ratio(before, seconds)))
            peaks = with_range(peak, scale=GIB)
            rows.append(Row((*cells, times(ratio(first, seconds)), peaks), rung.run_ids))
            before = seconds
        columns = (
            "Rung",
            "Layout",
            "Documents/s",
            "To rung before",
            "To first",
            "Peak, GiB",
        )
        parts.append(bars(f"ladder-{workload}", f"{workload}: documents a second, rung by rung", items))
        parts.append(Table(f"{workload}: the ladder", columns, tuple(rows), texts=2))
    return Section(
        "ladder",
        "Where the gain comes from",
        paragraphs=("One run a rung, the same work on each: a guide to causes, not a claim.",),
        parts=tuple(parts),
    )


def build_ceiling(evidence: Evidence) -> Section | None:
    """Model FLOP/s against a matrix-product ceiling measured on the same GPU."""
    parts: list[Chart | Table] = []
    for number, entry in enumerate(evidence.of_kind("ceiling"), 1):
        ceiling, probe = entry.parse(Ceiling), evidence.probe_of(entry)
        names = list(dict.fromkeys([*ceiling.model_flops_per_second, *ceiling.utilisation]))
        rows = [
            Row(
                ("matrix products (the ceiling)", digits(ceiling.tflops), percent(1.0)),
                (probe,) if probe else entry.run_ids,
            )
        ]
        items = []
        for name in names:
            flops, share = ceiling.model_flops_per_second.get(name), ceiling.utilisation.get(name)
            reached = None if flops is None else flops / _TERA
            shown = NONE if reached is None else digits(reached)
            backend = next((known for known in BACKENDS if name.startswith(known)), name)
            ids = tuple(run.id for run in evidence.runs_of([entry]) if run.backend == backend)
            rows.append(Row((name, shown, percent(share)), ids))
            items.append(Bar(name, backend, reached, f"{shown} TFLOP/s, {percent(share)}"))
        where = f"{ceiling.workload}: " if ceiling.workload else ""
        if items:
            line = (ceiling.tflops, f"ceiling {digits(ceiling.tflops)} TFLOP/s")
            parts.append(bars(f"ceiling-{number}", f"{where}model FLOP/s against the ceiling", items, line))
        columns = ("Backend", "TFLOP/s", "Of the ceiling")
        parts.append(Table(f"{where}model-FLOPs utilisation", columns, tuple(rows), is_beside=bool(items)))
    if not parts:
        return None
    return Section(
        "ceiling",
        "Use of the GPU's arithmetic",
        paragraphs=(
            "Model FLOPs: those that the model's forward and backward need, recomputation not counted. The ceiling is "
            "not a data sheet's: large bfloat16 matrix products, measured on this GPU in the same gate.",
        ),
        parts=tuple(parts),
    )
