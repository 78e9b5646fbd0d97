"""Reliability: one verdict per claim and backend, and what the probes measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from forge.training.report.page.content import Row, Section, Table
from forge.training.report.page.numbers import NONE, tied
from harness.reliability.claims import STOP_LIMIT_SECONDS
from harness.report.evidence import figures_of
from harness.report.verdicts import Judged, label, verdict_table

_Measured = tuple[str, str, str]  # what, its value, what it is compared with


def build(judged: list[Judged]) -> Section:
    """Raises :class:`DataError` for figures that cannot be shown."""
    parts = [verdict_table("reliability", judged, "What a run must survive", "Claim")]
    if rows := tuple(row for verdict in judged for row in _rows(verdict)):
        parts.append(Table("What was measured", ("Claim", "What", "Measured", "Against"), rows, texts=2))
    return Section("reliability", "Reliability", parts=tuple(parts))


def _rows(judged: Judged) -> list[Row]:
    verdict, entry = judged
    show = _SHOWN.get(verdict.name.rpartition("_")[0])  # the rest is the backend
    if entry is None or show is None or not verdict.figures:
        return []
    with figures_of(entry):
        return [Row((label(verdict), *cells), tuple(verdict.run_ids)) for cells in show(verdict.figures)]


def _resume(figures: dict[str, Any]) -> Iterator[_Measured]:
    noise = _difference(figures["noise"])
    for name in ("killed", "stopped"):
        run = figures[name]
        what = f"{name}, resumed from step {run['resumed_from_step']}: relative difference from a whole run"
        yield what, _difference(run["difference"]), f"two whole runs: {noise}"


def _difference(difference: dict[str, Any]) -> str:
    return "0, the same bits" if difference["identical"] else f"{difference['relative']:.2g}"


def _memory(figures: dict[str, Any]) -> Iterator[_Measured]:
    yield "micro-batch that it continued with", str(figures["micro_batch"]), tied(f"within {figures['cap_gib']:g} GiB")
    count = sum(resume["after"] == "out_of_memory" for resume in figures["resumes"])
    yield "times that it ran out of memory", str(count), "at least 1"
    yield "steps", str(figures["num_steps"]), f"{figures['num_planned_steps']} planned"


def _callbacks(figures: dict[str, Any]) -> Iterator[_Measured]:
    for number, events in enumerate(figures["events"], 1):
        yield f"events of step kind {number}: {', '.join(events.split())}", str(len(events.split())), NONE


def _stop(figures: dict[str, Any]) -> Iterator[_Measured]:
    yield "seconds from SIGTERM to the end", f"{figures['stop_seconds']:.1f}", f"at most {STOP_LIMIT_SECONDS:g}"
    sealed = figures["checkpoint_problem"] is None
    yield "checkpoint, MB", f"{figures['checkpoint_bytes'] / 1e6:.0f}", "sealed" if sealed else "not sound"


_SHOWN: dict[str, Callable[[dict[str, Any]], Iterator[_Measured]]] = {
    "resume": _resume,
    "memory": _memory,
    "callbacks": _callbacks,
    "stop": _stop,
}
